"""The table of families against the installed diffusers: no class without an answer, no name that is not there."""

from __future__ import annotations

import inspect
import re

import diffusers
import numpy as np
import pytest
import tiny
import tiny_families as tf
import tiny_transformers
import torch
from diffusers import modular_pipelines as modular
from diffusers.pipelines import auto_pipeline
from PIL import Image
from torch import nn

import diffgraft as dg
from diffgraft.pipelines.families.family import Family, Refused, names_of
from diffgraft.pipelines.families.loop import loop_for
from diffgraft.pipelines.families.table import FAMILIES

PARTS = r"unet|transformer|transformer_2|prior|prior_prior|prior_text|decoder|unconditional_\w+|dit|denoiser|model"
OTHER = {
    "AceStepTransformer1DModel", "AudioLDM2UNet2DConditionModel", "LongCatAudioDiTTransformer",
    "StableAudioDiTModel", "StableAudio3DiTModel", "MiniMaxMusic3Transformer1DModel",  # sound
    "UNet1DModel", "UNet2DModel", "RFD4ProteinaTransformer",  # no text
}  # fmt: skip
"""Denoisers that neither paint nor film from text."""
DECLARED = {name: said for name, said in FAMILIES.items() if isinstance(said, Family)}


def pipelines():
    """Every pipeline class that diffusers exports or maps."""
    mapped = [
        cls for name in dir(auto_pipeline) if name.endswith("_MAPPING") for cls in flat(getattr(auto_pipeline, name))
    ]
    named = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")]
    return {cls for cls in [*mapped, *named] if isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)}


def flat(found):
    values = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else [found]
    return [item for value in values for item in (flat(value) if isinstance(value, (dict, list, tuple)) else [value])]


def denoisers(cls):
    """Names of the denoiser classes that a pipeline's constructor asks for."""
    asked = inspect.signature(cls.__init__).parameters.values()
    told = " ".join(str(p.annotation) for p in asked if re.fullmatch(PARTS, p.name))
    return set(re.findall(r"\w+(?:Model|UNet|Transformer)\b", told)) - {"Transformer"}


def modular_pipelines():
    """Every modular pipeline class, with the names of the denoiser classes that its blocks ask for."""
    kinds = [getattr(modular, name) for name in dir(modular) if name.endswith("ModularPipeline")]
    for kind in (kind for kind in kinds if kind.default_blocks_name):
        specs = getattr(modular, kind.default_blocks_name)().expected_components
        yield kind, {spec.type_hint.__name__ for spec in specs if re.fullmatch(PARTS, spec.name)}


def test_every_denoiser_of_diffusers_has_an_answer():
    missing, found = {}, [(cls, denoisers(cls)) for cls in pipelines()]
    found += modular_pipelines()
    for cls, names in found:
        for name in names - set(FAMILIES) - OTHER:
            missing.setdefault(name, []).append(cls.__name__)
    assert not missing, (
        f"new in diffusers: {missing}. Write into FAMILIES of pipelines/families/table.py: "
        '"<class>": Family("<name>", (Meet("<its blocks>"),), ...), or Refused("<why>; use <what instead>")'
    )


def test_the_walk_finds_what_people_run():
    found = {name for cls in pipelines() for name in denoisers(cls)}
    assert {"ZImageTransformer2DModel", "Flux2Transformer2DModel", "WanTransformer3DModel", "UNetMotionModel"} <= found
    assert len(pipelines()) > 150


@pytest.mark.parametrize("name", FAMILIES)
def test_every_class_of_the_table_is_there(name):
    from diffusers.models import transformers

    assert hasattr(diffusers, name) or hasattr(transformers, name)


@pytest.mark.parametrize("name", [name for name, said in DECLARED.items() if said.adapter is None])
def test_every_name_of_a_declaration_is_there(name):
    family, kind = DECLARED[name], getattr(diffusers, name)
    taken = set(inspect.signature(kind.forward).parameters)
    assert {family.sample, family.timestep, family.text} <= taken
    assert {family.mask or family.text, *family.texts, *family.encoded, *family.residuals} <= taken
    assert family.ids is None or family.ids[0] in taken
    if name not in tf.models():
        return
    model: nn.Module = tf.denoiser(name)
    for meet in family.meets:
        block = next(iter(model.get_submodule(meet.path).children()))
        arguments = set(inspect.signature(type(block).forward).parameters)
        assert {meet.sequence if meet.how == "joint" else meet.text} <= arguments
        assert meet.text is None or meet.text in arguments
        assert {along.argument for along in meet.along} <= arguments
        assert meet.through is None or hasattr(block, meet.through)
    for start, _ in family.alone:
        assert any(path.startswith(start) for path, _ in model.named_modules())


MODULAR_ONLY = "Flux3Transformer2DModel"


@pytest.mark.parametrize("name", [n for n, said in DECLARED.items() if said.adapter is None and n != MODULAR_ONLY])
def test_what_a_declaration_reads_of_a_pipeline_is_there(name):
    """The local that says whether guidance is on, the one with the negative, and the places of the encoder's answer."""
    family = DECLARED[name]
    mine = [cls for cls in pipelines() if name in denoisers(cls) and hasattr(cls, "encode_prompt")]
    assert mine
    sources = [inspect.getsource(cls.__call__) for cls in mine]
    if family.guidance == "apart":
        names = (family.negative, "context_name", "negative_prompt_embeds")
        assert any(any(word in source for word in names) for source in sources), name
    else:
        assert any(family.flag in source or "guidance_scale" in source for source in sources)
    places = max(family.encoded.values(), default=0)
    answers = [inspect.getsource(cls.encode_prompt).rsplit("return", 1)[1] for cls in mine]
    given = [len(re.sub(r"\(([^()]*)\)", r"\1", answer).strip().strip(",").split(",")) for answer in answers]
    assert any(count > places for count in given)


def test_every_declared_family_has_a_tiny_model_or_is_tested_elsewhere():
    elsewhere = {
        "UNet2DConditionModel", "FluxTransformer2DModel", "SD3Transformer2DModel", "QwenImageTransformer2DModel",
        "PixArtTransformer2DModel", "SanaTransformer2DModel",
    }  # fmt: skip
    assert set(DECLARED) == {name.split()[0] for name in tf.models()} | elsewhere


class Strange(nn.Module):
    """A denoiser that nobody declared."""

    def forward(self, hidden_states):
        return hidden_states


@pytest.mark.parametrize("name", [name for name, said in FAMILIES.items() if isinstance(said, Refused)])
def test_a_refusal_names_the_class_and_its_reason(name):
    kind = type(name, (nn.Module,), {"__module__": "diffusers.models.transformers"})
    with pytest.raises(dg.UnsupportedPipelineError, match=name) as told:
        dg.graft(tf.Bare(kind(), None), dg.NegativeAway("red"))
    assert FAMILIES[name].reason in str(told.value)


def test_an_unknown_class_is_told_how_to_declare_itself():
    with pytest.raises(dg.UnsupportedPipelineError, match=r'declare_family\("Strange"') as told:
        dg.graft(tf.Bare(Strange(), None), dg.NegativeAway("red"))
    assert "ZImageTransformer2DModel" in str(told.value)


def test_a_subclass_of_diffusers_own_is_not_taken_for_its_base():
    name = "DreamLiteUNetModel"
    if hasattr(diffusers, name):
        assert issubclass(getattr(diffusers, name), diffusers.UNet2DConditionModel)
    assert isinstance(FAMILIES[name], Refused)
    unet = diffusers.UNet2DConditionModel
    odd, mine = (type(name, (unet,), {"__module__": f"{place}.unets"}) for place in ("diffusers.models", "mine"))
    for kind in (odd, type("Mine", (odd,), {"__module__": "mine"})):  # also where somebody goes on from such a class
        pipe = tf.BareUNet(kind.__new__(kind), None)
        with pytest.raises(dg.UnsupportedPipelineError, match="cannot be inverted"):
            loop_for(pipe)
    assert names_of(mine.__new__(mine)) == [name, "UNet2DConditionModel"]


def test_a_family_that_a_user_declares():
    name = "MyWanTransformer3DModel"
    mine = type(name, (type(tf.denoiser("WanTransformer3DModel")),), {"__module__": "mine"})
    spec = tf.models()["WanTransformer3DModel"]
    torch.manual_seed(1)
    pipe = tf.bare("WanTransformer3DModel")
    pipe.transformer = mine(**spec.config).eval()
    dg.declare_family(name, dg.Family("mine", (dg.Meet("blocks", "cross"),), guidance="apart"))
    texts = [tf.normal(7, 16, seed=i) for i in (1, 2)]
    with dg.graft(pipe, dg.NegativeAway(texts[1][None], scale=0.5)) as g, torch.no_grad():
        steered = pipe.transformer(**spec.call(texts[:1]))[0]
    with torch.no_grad():
        assert not torch.equal(steered, pipe.transformer(**spec.call(texts[:1]))[0])
    assert g.report().plugins[0][1]["scale_from"] == "given"
    for wrong in (None, "WanTransformer3DModel"):
        with pytest.raises(dg.SettingTypeError):
            dg.declare_family(name, wrong)


def test_the_support_table_is_the_declarations():
    from pathlib import Path

    from diffgraft.pipelines.families.support import support_table

    assert support_table() in Path(dg.__file__).with_name("pipelines").joinpath("README.md").read_text()


@pytest.mark.parametrize("name", ["sd15", "pixart", "sana", "sd3", "flux"])
def test_what_a_family_is_said_to_be_unable_to_do_is_refused_when_it_is_tried(name):
    from diffgraft.pipelines.families.support import unable

    pipe = tiny.sd15() if name == "sd15" else getattr(tiny_transformers, name)()
    denoiser = type(getattr(pipe, "unet", None) or pipe.transformer).__name__
    mask = np.zeros((32, 32), bool)
    mask[8:16, 8:16] = True
    tried = {
        "NegativeAway": dg.NegativeAway("blue"), "AttentionSegregation": dg.AttentionSegregation(["ball"]),
        "ConceptBlock": dg.ConceptBlock(["ball"]), "SelfAttentionRedirection": dg.SelfAttentionRedirection(mask),
        "StartpointFilter": dg.StartpointFilter(),
    }  # fmt: skip
    refused = set()
    for plugin, made in tried.items():
        try:
            with dg.graft(pipe, made):
                pass
        except dg.UnsupportedPipelineError:
            refused.add(plugin)
    assert refused == {*unable(denoiser)} & {*tried}


TASKS = ("erase", "stylize", "invert")


@pytest.mark.parametrize("name", [name for name in tf.models() if " " not in name and name in DECLARED])
def test_every_family_does_a_task_or_refuses_it_by_name(name):
    """Those that do are run in test_erase_transformers, test_style_joint and test_inversion_families."""
    from diffgraft.pipelines.families.support import unable

    picture, mask, pipe = Image.new("RGB", (32, 32)), np.zeros((32, 32), bool), tf.bare(name)
    mask[8:16, 8:16] = True
    tasks = {
        "erase": lambda: dg.erase(pipe, picture, mask, seed=0, steps=2),
        "stylize": lambda: dg.stylize(pipe, picture, picture, seed=0, steps=1),
        "invert": lambda: dg.invert(pipe, picture, steps=1),
    }
    for task in {*unable(name)} & {*TASKS}:
        with pytest.raises(dg.UnsupportedPipelineError, match=name) as refused:
            tasks[task]()
        assert re.search(r"SD2|SD3|Flux", str(refused.value))  # what to use instead


def test_every_family_that_does_a_task_is_run():
    import test_erase_transformers
    import test_inversion_families
    import test_style_joint

    from diffgraft.pipelines.families.support import unable

    called = {"klein": "flux2", "flux guidance": "flux"}
    run = {
        "erase": test_erase_transformers.MAKE, "stylize": [*test_style_joint.JOINT, "pixart"],
        "invert": test_inversion_families.PIPES,
    }  # fmt: skip
    for task in TASKS:
        able = {said.name for name, said in DECLARED.items() if task not in unable(name)} - {"unet"}
        assert able == {called.get(name, name) for name in run[task]}


def test_families_without_a_declaration_can_do_nothing():
    from diffgraft.pipelines.families.support import unable

    assert unable("UNet2DConditionModel") == {}
    assert {*unable("Unheard")} == {*unable("BriaFiboTransformer2DModel")} >= {"erase", "NegativeAway"}
    assert "NegativeAway" not in unable("WanTransformer3DModel") and "films" in unable("WanTransformer3DModel")["erase"]
    assert "order" in unable("GlmImageTransformer2DModel")["AttentionSegregation"]
    assert unable("FluxTransformer2DModel") == {} and {*unable("SD3Transformer2DModel")} == {"ConceptBlock"}
    sana = unable("SanaTransformer2DModel")
    assert "linearly" in sana["stylize"] and "invert" not in sana
    assert "no pipeline" in unable("PixArtTransformer2DModel")["erase"]
