"""Train an image classifier, or fine-tune one of images or texts, with Adversarial Model Perturbation.

AMP is short for that here, not for automatic mixed precision.

    train.py --optim amp           # a narrow PreActResNet on a bundled sample of CIFAR-10
    train.py --optim sgd           # the same job without AMP
    train.py preactresnet18_cifar10 --amp_epsilon 0.3                # a published setting, changed
    train.py preactresnet18_cifar10 --dry_run                        # what that would do and take
    train.py --pretrained resnet18.a1_in1k --dataset cifar10         # from pretrained weights

The job works under ``accelerate launch`` and ``torchrun`` too. It ends with a table, the saved model and a picture of
the training curves in the output folder. With ``--save_strategy epoch --resume_from_checkpoint last`` it may be killed
at any moment: the same command given again continues to the same weights, bit for bit. ``--minutes 60`` stops before
an hour is over, with a checkpoint and the command that continues.
"""
