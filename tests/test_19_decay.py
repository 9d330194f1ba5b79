"""Which parameters are pulled towards 0."""
import pytest

from common import optimizer_of
from train_gpt2 import GPT, GPTConfig


@pytest.fixture
def model():
    return GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=4))


@pytest.fixture
def groups(model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["weight_decay"]: [names[id(p)] for p in group["params"]]
            for group in optimizer_of(model, 1e-3).param_groups}


def test_matrices_and_embeddings_decay_biases_and_layernorms_do_not(groups):
    assert set(groups) == {0.1, 0.0}
    assert all(name.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight"))
               for name in groups[0.1])
    assert all(name.endswith("bias") or ".ln_" in name for name in groups[0.0])


def test_every_parameter_is_in_one_group_once(model, groups):
    assert sorted(groups[0.1] + groups[0.0]) == sorted(name for name, _ in model.named_parameters())


def test_the_update_is_one_fused_kernel(model):
    optimizer = optimizer_of(model, 1e-3)
    assert optimizer.defaults["fused"] is True and all(group["fused"] for group in optimizer.param_groups)
