"""What several tests need."""

import torch


torch.set_num_threads(1)  # with models this small, threads mostly wait for each other


def logits_of(model, idx):
    return model(idx)


def randomise(module, std=0.3, seed=0):
    """Give every parameter, biases and LayerNorms too, random values, so that a mix-up shows. Returns the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=std, generator=generator)
    return module
