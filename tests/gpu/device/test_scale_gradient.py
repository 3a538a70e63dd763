"""The interpreter's tests of `scale_gradient`, on a GPU."""

from __future__ import annotations

import pytest

from tests.gpu.interpreted.test_scale_gradient import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("launches_on_the_device")
