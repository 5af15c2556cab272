"""Generation with a cache draws what the whole forward pass says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsft.hardware.mesh import make_mesh
from jsft.hf.load import load_parameters
from jsft.models import Decoder, DecoderOptions, read_config
from jsft.models.config import Llama3Rope
from jsft.models.generate import Draws, generate

FAMILIES = {  # what a layer may have: norms of heads or biases, a tied embedding or not, stretched frequencies
    "qwen3": {},
    "llama": {"tied": False, "attention_bias": True, "rope_llama3": Llama3Rope(8.0, 1.0, 4.0, 16)},
}
LENGTHS = (3, 17, 9)
ROOM = 12


@pytest.fixture
def load(random_model):
    """family -> (module on one device, `generate` of it for given prompts)."""

    def load(family, devices=1):
        model_dir = random_model(family, **FAMILIES[family])
        config, mesh = read_config(model_dir), make_mesh(devices=jax.devices()[:devices])
        options = DecoderOptions(mesh, jnp.float32, norms="xla")
        module = Decoder(config, load_parameters(model_dir, config, mesh, jnp.float32), options)

        def draw(prompts, lengths, most=ROOM, temperature=0.0, seed=0, stops=(-2,)):
            draws = Draws(np.int32(seed), np.float32(temperature), np.int32(most), np.array(stops, np.int32))
            lengths = np.array(lengths, np.int32)
            found = generate(module.parameters(), prompts, lengths, draws, model=config, options=options, room=ROOM)
            return np.asarray(found)

        return module, draw

    return load


def prompts_of(lengths, width=20):
    rng = np.random.default_rng(3)
    prompts = rng.integers(0, 259, (len(lengths), width)).astype(np.int32)  # what follows a prompt must not matter
    return prompts, [prompt[:n] for prompt, n in zip(prompts, lengths)]


@pytest.mark.parametrize(("family", "devices"), [("qwen3", 8), ("llama", 1)])
def test_the_most_likely_tokens_are_those_of_the_forward_pass(load, family, devices):
    module, draw = load(family, devices)
    prompts, alone = prompts_of(LENGTHS)
    found = draw(prompts, LENGTHS)
    texts = np.zeros((len(LENGTHS), max(LENGTHS) + ROOM), np.int32)
    for text, prompt, tokens in zip(texts, alone, found):
        text[: len(prompt) + ROOM] = [*prompt, *tokens]
    logits = np.asarray(jax.jit(type(module).__call__)(module, texts))
    for row, n, tokens in zip(logits, LENGTHS, found):
        np.testing.assert_array_equal(row[n - 1 : n - 1 + ROOM].argmax(-1), tokens)


def test_a_text_ends_with_its_first_stop_and_at_the_limit(load):
    _, draw = load("qwen3", 8)
    prompts, _ = prompts_of(LENGTHS)
    free = draw(prompts, LENGTHS)
    stop = free[0, 2]
    found = draw(prompts, LENGTHS, stops=(259, stop), most=10)
    for tokens, before in zip(found, free):
        ends = np.flatnonzero(before[:10] == stop)
        kept = ends[0] + 1 if len(ends) else 10
        assert tokens.tolist() == [*before[:kept], *[-1] * (ROOM - kept)]


def test_samples_are_drawn_from_the_softmax(load):
    module, draw = load("qwen3")
    prompts, _ = prompts_of([9])
    many = draw(np.repeat(prompts, 2048, axis=0), [9] * 2048, most=1, temperature=1.5, seed=1)[:, 0]
    logits = np.asarray(jax.jit(type(module).__call__)(module, prompts[:, :9]))[0, -1].astype(np.float64) / 1.5
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    surprise = -np.log(shares)
    error = surprise[many].mean() - shares @ surprise
    assert abs(error) < 4 * np.sqrt(shares @ surprise**2 - (shares @ surprise) ** 2) / np.sqrt(2048)
    assert len(set(many.tolist())) > 20
