"""Pretraining of language models on PyTorch Lightning: data, typed configs, task, checkpoints, command line.

The command line is ``flash-attn-train`` (:mod:`flash_attn_train.cli`). From Python::

    from flash_attn_train.configs import TrainConfig
    from flash_attn_train.run import train

    result = train(TrainConfig())
"""

__version__ = "0.1.0"
