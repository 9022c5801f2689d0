"A model family that a user registers, and the one that the package registers itself."

from dataclasses import dataclass

import pytest

from minigpt.config.options import TrainConfig
from minigpt.model import families
from minigpt.model.families import Family, config_from_dict, family_of, from_hf, register_family
from minigpt.model.generation import complete, stream_text
from minigpt.model.gpt import GPT, GPTConfig, LanguageModel, check_gpt


@dataclass(frozen=True)
class Shape:
    vocab_size: int

    def to_dict(self):
        return dict(model_type="parrot", vocab_size=self.vocab_size)


class Parrot(LanguageModel):
    config = Shape(300)


@pytest.fixture
def parrots(monkeypatch):
    "A family whose models record the calls they get."
    monkeypatch.setattr(families, "_registered", [*families._registered])
    read = lambda d: Shape(d["vocab_size"])
    say = lambda model, tok, prompt, tools, thinking, **how: iter([prompt, f" {tools} {how}"])
    register_family(
        Family(
            model_types=("parrot",),
            config=Shape,
            from_hf=read,
            from_dict=read,
            stream=say,
            instead="; it repeats",
        )
    )


def test_registered_family_is_used(parrots):
    assert from_hf(dict(model_type="parrot", vocab_size=300)) == Parrot.config
    assert config_from_dict(Parrot.config.to_dict()) == Parrot.config
    assert [*stream_text(Parrot(), None, "Hello", seed=1)] == ["Hello", " None {'seed': 1}"]
    assert complete(Parrot(), None, "Hello", [3]) == "Hello [3] {}"
    with pytest.raises(TypeError, match="this is a Parrot; it repeats$"):
        check_gpt(Parrot(), "a chat")


def test_unregistered_family_is_refused():
    assert family_of(Parrot()) is None and family_of("runs/mine") is None
    with pytest.raises(TypeError, match="this is a Parrot$"):
        check_gpt(Parrot(), "a chat")
    with pytest.raises(ValueError, match="'llama', 'qwen3' and 'roberta' models only"):
        from_hf(dict(model_type=["llama"]))
    with pytest.raises(KeyError):
        config_from_dict(dict(model_type="parrot"))


def test_package_has_two_families():
    gpt = GPT(GPTConfig.preset("tiny", vocab_size=300))
    assert family_of(gpt).model_types == ("llama", "qwen3") and family_of(gpt).objective is None
    shape = dict(vocab_size=300, dim=32, n_layer=1, n_head=2, ffn_dim=64)
    encoder = config_from_dict(dict(model_type="roberta", **shape)).build()
    learns = family_of(encoder).objective(encoder, None, TrainConfig())
    assert type(learns).__name__ == "Denoising"
    with pytest.raises(TypeError, match="a Tess, which fills gaps; use minigpt.diffusion"):
        check_gpt(encoder, "a chat")
