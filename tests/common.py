"""What several tests need."""

import numpy as np

import torch


import train_gpt2


torch.set_num_threads(1)  # with models this small, threads mostly wait for each other


def logits_of(model, idx):
    return model(idx)[0]


def randomise(module, std=0.3, seed=0):
    """Give every parameter, biases and LayerNorms too, random values, so that a mix-up shows. Returns the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=std, generator=generator)
    return module


def talkative(model, seed=0):
    """Give a GPT large random matrices and no biases: its likeliest text goes on changing. Returns the model."""
    randomise(model, std=1.0, seed=seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p.fill_(name.endswith("weight"))  # LayerNorm: weights 1, biases 0
    return model


def generate(model, prompts, *args, **kwargs):
    """The new tokens of each row, a list of lists."""
    return torch.stack(list(model.generate(prompts, *args, **kwargs)), dim=1).tolist()


@torch.no_grad()
def naive(model, prompt, n):
    """The n likeliest tokens after a prompt, one at a time, computing the whole context each time."""
    idx = torch.tensor([prompt])
    for _ in range(n):
        logits = logits_of(model, idx[:, -model.config.block_size:])[:, -1]
        idx = torch.cat((idx, logits.argmax(-1, keepdim=True)), dim=1)
    return idx[0, len(prompt):].tolist()


def loader_of(tokens, B, T, **kwargs):
    """A loader of one row of ids."""
    return train_gpt2.DataLoaderLite(np.asarray(tokens), B, T, **kwargs)
