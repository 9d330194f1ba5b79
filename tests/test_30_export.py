"""Out into the world: what is exported is the same model and tokenizer for Hugging Face, and for a server's callers."""
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_gpt2
from common import (TINY, assert_they_say_the_same, completion, environment, generate, run, run_here, serving, short_text,
                    talkative)
from train_gpt2 import GPT, GPTConfig, UserError, get_tokenizer, load_checkpoint

HARD = ["", "hello  world\n\n", "naïve 你好 🙂\r\n\t x", "it's we'LL 'tis", "\x00\x1c\xa0\u3000", "x" * 300,
        " \n \n ", "1234567 8.9", "def f(x):\n    return  x\n", "नमस्ते عالم", "e\u0301 \u200d👩‍👩‍👧"]


@pytest.fixture(params=["byte", "gpt2"])
def enc(request):
    try:
        return get_tokenizer(request.param)
    except UserError as e:
        pytest.skip(str(e))


def model_for(enc, block_size=64):
    return talkative(GPT(GPTConfig(block_size, enc.n_vocab, 2, 2, 32)))


def exported(model, enc, path):
    train_gpt2.export(model, enc, path, "a note")
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def test_hugging_face_loads_the_same_model(enc, tmp_path):
    model = model_for(enc)
    theirs, _ = exported(model, enc, tmp_path / "hf")
    assert theirs.config.vocab_size == enc.n_vocab == theirs.lm_head.weight.size(0)  # without the padding
    assert theirs.config.n_ctx == theirs.config.n_positions  # which llama.cpp's converter reads
    idx = torch.randint(enc.n_vocab, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-4, rtol=1e-5)
    prompt = idx[:1, :8]
    text = theirs.generate(prompt, do_sample=False, max_new_tokens=40)[0, 8:].tolist()
    assert text == generate(model, prompt.tolist(), 40, temperature=0)[0] and len(set(text)) > 5
    assert theirs.generation_config.do_sample and theirs.generation_config.eos_token_id == enc.eot_token


def test_hugging_faces_tokenizer_is_tiktokens(enc, tmp_path):
    _, tokenizer = exported(model_for(enc), enc, tmp_path / "hf")
    for text in HARD:
        ids = tokenizer(text)["input_ids"]
        assert ids == enc.encode_ordinary(text), text
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == enc.n_vocab and tokenizer.eos_token_id == enc.eot_token
    assert tokenizer("<|endoftext|>")["input_ids"] == [enc.eot_token]  # as Hugging Face does it for GPT-2


def test_back_again_the_weights_are_the_same_bits(enc, tmp_path):
    model = model_for(enc)
    exported(model, enc, tmp_path / "hf")
    back = train_gpt2.from_pretrained(str(tmp_path / "hf"))
    assert back.config == model.config and torch.equal(back(torch.tensor([[1, 2]])), model(torch.tensor([[1, 2]])))
    for (name, a), b in zip(model.named_parameters(), back.parameters(), strict=True):
        n = enc.n_vocab if name == "lm_head.weight" or name.endswith("wte.weight") else len(a)
        assert torch.equal(a[:n], b[:n]), name


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    here = short_text(tmp_path_factory.mktemp("here"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(monkeypatch, here, *TINY, "--max_steps", "200", "--sample_every", "0", "--max_lr", "3e-3")
        run_here(monkeypatch, here, "--export", "my_model")
    return here


def test_the_flag_writes_a_folder_with_a_card_and_takes_nobodys_place(here):
    names = {path.name for path in (here / "my_model").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    card = (here / "my_model/README.md").read_text()
    assert card.startswith("---\n") and "library_name: transformers\n" in card
    # 257 tokens and 32 positions; a block of 32 wide; the last LayerNorm.
    millions = ((257 + 32) * 32 + 12 * 32**2 + 13 * 32 + 2 * 32) / 1e6
    (said,) = re.findall(r"^By train_gpt2\.py: ([\d.]+) M parameters, (.+)$", card, re.M)
    assert said[0] == f"{millions:.1f}"
    assert {"tokenizer byte", "data input.txt", f"from {Path('log', 'model_00200.pt')}"} <= {*said[1].split(", ")}
    before = {path: path.read_bytes() for path in (here / "my_model").iterdir()}
    done = run("--export", "my_model", cwd=here, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "choose another" in done.stderr
    assert before == {path: path.read_bytes() for path in (here / "my_model").iterdir()}
    assert not (here / "my_model.tmp").exists()


def test_the_training_text_need_not_be_there_any_more(here, tmp_path):
    done = run("--log_dir", here / "log", "--export", "elsewhere", cwd=tmp_path)
    assert "exported to elsewhere" in done.stdout and (tmp_path / "elsewhere" / "config.json").exists()


def test_init_from_the_folder_speaks_as_the_checkpoint_does(here, monkeypatch, capsys):
    assert_they_say_the_same(("my_model", "log/model_00200.pt"), here, monkeypatch, capsys)


def test_it_loads_where_there_is_nothing_but_transformers(here):
    code = ("import sys; sys.modules['tiktoken'] = sys.modules['train_gpt2'] = None\n"
            "from transformers import pipeline\n"
            "pipe = pipeline('text-generation', 'my_model', device='cpu')\n"
            "print('said', repr(pipe('MIRA:', max_new_tokens=20, do_sample=False)[0]['generated_text']))")
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True,
                          env=environment(HF_HUB_OFFLINE="1"), timeout=120)
    assert "said 'MIRA:" in done.stdout, done.stderr


# A server -------------------------------------------------------------------------------------------------------------

def greedy(here, prompt, n):
    state = load_checkpoint(here / "log/model_00200.pt")
    model, enc = GPT(GPTConfig(**state["model_config"])), get_tokenizer("byte")
    model.load_state_dict(state["model"])
    return enc.decode(generate(model, [enc.encode_ordinary(prompt)], n, temperature=0)[0])


@pytest.fixture(scope="module")
def server(here):
    """The address of a real server of the exported folder on loopback."""
    with serving("my_model", here) as address:
        yield address


def test_the_server_says_what_the_model_says(here, server):
    assert completion(server, "my_model", "MIRA:", 20) == greedy(here, "MIRA:", 20)


def test_an_openai_client_streams(here, server):
    import openai
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    pieces = [chunk.choices[0].text for chunk in client.completions.create(
        model="my_model", prompt="ROWAN:", max_tokens=20, temperature=0, stream=True) if chunk.choices]
    assert len([p for p in pieces if p]) > 1 and "".join(pieces) == greedy(here, "ROWAN:", 20)


# Another program ------------------------------------------------------------------------------------------------------

def test_the_ten_lines_of_the_readme_run(here):
    code = re.search(r"```python\n(from train_gpt2 import.*?)```", (Path(train_gpt2.__file__).parent / "README.md")
                     .read_text(encoding="utf-8"), re.S).group(1)
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, encoding="utf-8", timeout=120,
                          env=environment(PYTHONPATH=str(Path(train_gpt2.__file__).parent) + os.pathsep))
    assert done.returncode == 0, done.stderr
    state = load_checkpoint(here / "log/model_00200.pt")
    assert done.stdout.startswith(greedy(here, "MIRA:", 100))
    model, ids = GPT(GPTConfig(**state["model_config"])), list(b"MIRA:\nThe sea")
    model.load_state_dict(state["model"])
    log_probs = model(torch.tensor([ids])).log_softmax(-1)[0]
    mean = -sum(log_probs[i, ids[i + 1]].item() for i in range(len(ids) - 1)) / (len(ids) - 1)
    assert float(re.search(r"perplexity ([\d.]+)", done.stdout).group(1)) == pytest.approx(math.exp(mean), abs=0.01)
    assert "embedding torch.Size([32])" in done.stdout
