"""Trains the picture book's denoiser and text encoder on encoded scenes.

    python -m diffgraft.app.bench.train --minutes 120                            # from .train/denoiser.pt, if there
    python -m diffgraft.app.bench.train --minutes 120 --from assets/picturebook  # from weights, fresh optimizer
    python -m diffgraft.app.bench.train --minutes 60 --from assets/picturebook --keep-text --singles 0.3 --peak 1e-3

The last trains the denoiser alone, so that the one-step student, which shares the text encoder, stays as it is.
Each run of a time box ends with the learning rate near zero and leaves `.train/picturebook` (averaged weights,
float32). `--export DIR` writes those in float16 and ends.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from .denoiser import (
    build_scheduler,
    build_text_encoder,
    build_unet,
    draw_times,
    grounding_loss,
    pipeline,
    watch_decoder,
    weighted_loss,
    with_rim,
)
from .muon import Pair
from .trainer import BoxTrainer
from .training import arguments, autocast, contact_sheet, folder, log

PEAK, BATCH, GROUNDING = 2e-3, 128, 0.1
SHOWN = [
    "a red ball , sky",
    "a blue star , meadow , sketch style",
    "a yellow house , snow",
    "a green fish , sea , watercolor style",
    "a red heart and a blue moon , night",
    "a pink flower and a purple box , desert",
    "an orange boat and a white tree , sea , dots style",
    "a blue ball and a yellow star , night , mosaic style",
    "a green box and a red tree , snow",
    "a purple fish and a white boat , sea",
    "a red ball and a blue flower , meadow",
    "a yellow star and a pink house and a green tree , night",
]


class Trainer(BoxTrainer):
    """The UNet and its text encoder; with `keep_text` the UNet alone."""

    def __init__(
        self, work: Path, device: str, source: Path | None, keep_text: bool = False, peak: float = PEAK
    ) -> None:
        self.unet, self.text = build_unet(), build_text_encoder()
        if source:
            given = StableDiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32)
            self.unet, self.text = given.unet, given.text_encoder
        self.unet.to(device, memory_format=torch.channels_last).train()
        self.text.to(device).train()
        self.watched = watch_decoder(self.unet)
        optimizer = Pair([self.unet] if keep_text else [self.unet, self.text], peak)
        super().__init__(work / "denoiser.pt", {"unet": self.unet, "text": self.text}, optimizer, device)
        self.text.requires_grad_(not keep_text)
        self.work = work
        self.alphas = build_scheduler().alphas_cumprod.to(device)

    def batch(self, size: int, easy: float) -> dict[str, torch.Tensor]:
        """Random scenes (see `Scenes.batch`) with a timestep each."""
        found = {**self.scenes.batch(size, easy, self.singles), "time": draw_times(size)}
        return {name: part.to(self.device, non_blocking=True) for name, part in found.items()}

    def losses(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Denoising error of the velocity, and attention that leaves its thing (only as far as the noise lets the
        thing be seen).
        """
        alpha = self.alphas[batch["time"]].view(-1, 1, 1, 1)
        clean, noise = batch["latent"], batch["noise"]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        with autocast(self.device):
            words = self.text(batch["tokens"])[0]
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            guess = self.unet(noisy, batch["time"], encoder_hidden_states=words).sample
        denoising = weighted_loss(guess.float() - velocity, batch["masks"].flatten(-2)).mean()
        masks = with_rim(batch["masks"])
        outside = sum(grounding_loss(layer.maps, masks, batch["columns"]) for layer in self.watched) / len(self.watched)
        return denoising, (outside * alpha.flatten().sqrt()).mean()

    def advance(self, size: int, easy: float, rate: float) -> torch.Tensor:
        """One step; returns the denoising error and the share of attention outside."""
        losses = torch.stack(self.losses(self.batch(size, easy)))
        self.descend(losses[0] + GROUNDING * losses[1], rate)
        return losses.detach().cpu()

    @torch.no_grad()
    def show(self) -> None:
        """Saves the averaged weights as a pipeline, and a contact sheet drawn with them."""
        self.ema.swap()
        vae = AutoencoderKL.from_pretrained(self.work / "vae").to(self.device)
        pipe = pipeline(vae, self.unet, self.text)
        pipe.save_pretrained(self.work / "picturebook")
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        pictures = pipe(SHOWN, num_inference_steps=25, guidance_scale=2.5, generator=generator).images
        contact_sheet(pictures, 6).save(self.work / f"sheet-{self.step:06d}.png")
        self.ema.swap()
        log.info("contact sheet at step %d", self.step)


def export(work: Path, target: Path) -> None:
    """Writes the averaged weights of `work` in float16, in diffusers format, without the path they came from."""
    pipe = StableDiffusionPipeline.from_pretrained(work / "picturebook", torch_dtype=torch.float16)
    for part in (pipe, pipe.unet, pipe.vae):
        part.register_to_config(_name_or_path="picturebook")
    pipe.save_pretrained(target)


if __name__ == "__main__":
    parser = arguments(__doc__ or "", minutes=120)
    parser.add_argument(
        "--fresh-box", action="store_true", help="go on from the checkpoint's weights in a new time box"
    )
    parser.add_argument("--from", dest="source", type=folder, help="a pipeline to go on from, not the checkpoint")
    parser.add_argument("--batch", type=int, default=BATCH, help="scenes a step; 512 on a GPU")
    parser.add_argument("--keep-text", action="store_true", help="train the denoiser alone")
    parser.add_argument("--peak", type=float, default=PEAK, help="learning rate; half of it for weights that are good")
    parser.add_argument("--singles", type=float, default=0.0, help="further share of each batch with one thing only")
    parser.add_argument("--export", type=Path, help="write the averaged weights in float16 to this folder and end")
    args = parser.parse_args()
    if args.export:
        export(args.work, args.export)
    else:
        trainer = Trainer(args.work, args.device, args.source, args.keep_text, args.peak)
        trainer.singles = args.singles
        if not args.source:
            trainer.resume(args.fresh_box)
        trainer.load_data()
        trainer.run(args.minutes, args.batch)
