"""Small plugins that use every stage, and the fingerprint that must not change."""

from __future__ import annotations

import torch

from diffgraft import Branch, Edit, Plugin, stop_probe


class Everywhere(Edit):
    """Selected on every layer, changes nothing."""

    def selects(self, layer):
        return True


class NoOp(Plugin):
    def edits(self):
        return [Everywhere()]


class Scale(Edit):
    """Multiplies the attention output of the conditional rows."""

    rows = ("cond",)

    def __init__(self, factor, kind="cross", order=0):
        self.factor, self.kind, self.order = factor, kind, order

    def selects(self, layer):
        return layer.kind == self.kind

    def out(self, call, out):
        out = out.clone()
        out[call.select("cond")] *= self.factor
        return out


class Scaled(Plugin):
    def __init__(self, factor, kind="cross", **window):
        super().__init__(**window)
        self.factor, self.kind, self.steps = factor, kind, []

    def begin(self, session, step):
        self.steps.append("begin")

    def edits(self):
        return [Scale(self.factor, self.kind)]

    def branches(self, step):
        self.steps.append((step.index, step.total))
        return ()


class Peek(Edit):
    """Keeps the probabilities of one layer's own attention while a probe runs, then ends the probe."""

    wants_probs = True

    def __init__(self, name, kept):
        self.name, self.kept = name, kept

    def selects(self, layer):
        return layer.name == self.name

    def active(self, layer, step):
        return step.phase == "latent"

    def probs(self, call, probs):
        if call.step.probing:
            self.kept.append(probs)
            stop_probe(call.step)
        return probs


class Climb(Plugin):
    """Moves the latent up the attention that token 2 gets in the last up cross layer."""

    def __init__(self, rate=5.0, **window):
        super().__init__(**window)
        self.rate, self.kept, self.gradients, self.indices = rate, [], [], []

    def bind(self, session):
        self.name = [x.name for x in session.layers if x.kind == "cross" and x.place == "up"][1]

    def edits(self):
        return [Peek(self.name, self.kept)]

    def latent(self, step, latent, probe):
        latent.requires_grad_(True)
        self.kept.clear()
        assert probe(latent) is None
        (gradient,) = torch.autograd.grad(self.kept[0][..., 2].mean(), latent)
        self.kept.clear()
        self.gradients.append(gradient)
        self.indices.append(step.index)
        return latent + self.rate * gradient


class Damp(Edit):
    """Halves the self-attention output of the rows of its branch, from the decoder on."""

    rows = ("damped",)

    def __init__(self, place="up"):
        self.place = place

    def selects(self, layer):
        return layer.kind == "self" and layer.place == self.place

    def out(self, call, out):
        rows = call.rows["damped"]
        return torch.cat([out[: rows.start], out[rows] * 0.5, out[rows.stop :]])


class Guide(Plugin):
    """Perturbed guidance: pushes the prediction away from a damped branch."""

    def __init__(self, scale=2.0, place="up", **window):
        super().__init__(**window)
        self.scale, self.place = scale, place

    def edits(self):
        return [Damp(self.place)]

    def branches(self, step):
        return [Branch("damped")]

    def combine(self, step, prediction, rows):
        return self.scale * (prediction[rows["cond"]] - prediction[rows["damped"]])


def fingerprint(pipe):
    """Everything a graft could leave behind, by identity where identity matters."""
    unet = getattr(pipe, "unet", None) or pipe.transformer
    return {
        "own forwards": [name for name, m in unet.named_modules() if "forward" in m.__dict__],
        "hooks": [
            name
            for name, m in unet.named_modules()
            if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or hasattr(m, "_diffusers_hook")
        ],
        "processors": {name: id(p) for name, p in getattr(unet, "attn_processors", {}).items()},
        "grads": [p.requires_grad for p in unet.parameters()],
        "scheduler": sorted(pipe.scheduler.__dict__),
        "state": sorted(unet.state_dict()),
        "config": dict(unet.config),
        "repr": repr(unet),
    }
