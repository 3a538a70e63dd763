"""The interpreter's tests of `epilogue_backward`, on a GPU."""

from __future__ import annotations

import pytest

from tests.gpu.interpreted.test_epilogue_backward import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("launches_on_the_device")
