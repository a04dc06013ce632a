"""`AMPTrainer`: `transformers.Trainer` with AMP, with checkpoints that survive a kill, and with publishing."""
