"""Floor 5: thin loops around the engine, and what they write: checkpoints, logs, reports."""
