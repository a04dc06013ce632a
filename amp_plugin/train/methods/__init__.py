"""The methods that the paper compares AMP with, as the main job trains with them.

Three of them change the batch or its loss (mixup, adversarial training, flooding), and go together with any optimizer,
AMP too. Three are optimizers (random model perturbation, SAM, ASAM): AMP's own, with another displacement.
"""
