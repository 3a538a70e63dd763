"""What the rows are measured against: the same mathematics in plain PyTorch, nothing of this package inside."""
