"""Define the baselines that AMP is compared with, the paper's and SAM and ASAM, as the main job trains with them.

Three of them change the batch or its loss (mixup, adversarial training, flooding), and go together with any optimizer,
AMP too. Three are optimizers (random model perturbation, SAM, ASAM), which are AMP with another displacement.
"""
