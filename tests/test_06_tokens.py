"""Two tokenizers, one interface: bytes, and GPT-2's byte-pair encoding."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train_gpt2 import UserError, get_tokenizer

TEXTS = ["", "Hello, world!\n", "naïve — 你好 🙂 \r\n\t", "a\x00b", "<|endoftext|>", "x" * 10_000]


@pytest.fixture(params=["byte", "gpt2"])
def enc(request):
    try:
        return get_tokenizer(request.param)
    except UserError as e:
        pytest.skip(str(e))


def test_text_comes_back_as_it_went_in(enc):
    for text in TEXTS:
        ids = enc.encode_ordinary(text)
        assert enc.decode(ids) == text
        assert all(0 <= i < enc.n_vocab and i != enc.eot_token for i in ids)  # also where the text spells <|endoftext|>
    assert enc.eot_token == enc.n_vocab - 1
    assert enc.decode([enc.eot_token]) == "<|endoftext|>"


def test_byte_tokens_are_the_bytes():
    enc = get_tokenizer("byte")
    assert (enc.n_vocab, enc.eot_token) == (257, 256)
    for text in TEXTS:
        assert enc.encode_ordinary(text) == list(text.encode("utf-8"))
    assert b"".join(enc.decode_single_token_bytes(i) for i in range(256)) == bytes(range(256))  # utf-8 or not


def test_gpt2_tokens_are_openais():
    try:
        enc = get_tokenizer("gpt2")
    except UserError as e:
        pytest.skip(str(e))
    import tiktoken
    assert (enc.n_vocab, enc.eot_token) == (50257, 50256)
    assert enc.encode_ordinary("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    for text in TEXTS:
        assert enc.encode_ordinary(text) == tiktoken.get_encoding("gpt2").encode(text, disallowed_special=())


@pytest.mark.process
def test_without_vocabulary_and_network_one_line_names_both_ways_out(tmp_path):
    # In a process of its own, for tiktoken remembers a vocabulary that it has loaded once.
    code = """
import socket
def refuse(*args, **kwargs):
    raise OSError("no network")
socket.getaddrinfo = socket.socket.connect = refuse
from train_gpt2 import UserError, get_tokenizer
try:
    get_tokenizer("gpt2")
except UserError as e:
    print(e)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True,
                         env={**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path)}).stdout
    assert "--tokenizer byte" in out and "TIKTOKEN_CACHE_DIR" in out and out.count("\n") == 1
