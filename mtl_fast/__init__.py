"""Meta-transfer learning for few-shot classification. Importing it starts nothing."""

__version__ = "0.1.0"
