"""`AMPTrainer`, and the mixins beside AMP's that it is made of: checkpoints that survive a kill, and publishing."""
