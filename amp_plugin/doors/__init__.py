"""The doors: where a training loop that somebody else wrote meets AMP. A door decides only when the passes are made."""
