"""Distribution matching for the transformer's four-step student.

    python -m diffgraft.app.bench.matching_flow --minutes 60

As `matching`; the student walks to one of its four levels of noise, without gradients, and what it sees from there is
the drawing: from pure noise in half of the steps, where all is decided, from any other level in the rest ("backward
simulation" of Yin and others, 2024, section 4.4, with this pipeline's own Euler steps between the levels).
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel

from .flow import compile_blocks, encode_words
from .flow_student import STEPS, distilled, levels
from .matching import BATCH, Matching, Words, processes
from .training import arguments, folder


class FewSteps(Matching):
    """The transformer's student, all in float32. Times are the shares of noise."""

    def __init__(self, work: Path, teacher: Path, start: Path, device: str, cells: int = 32) -> None:
        pipe = ZImagePipeline.from_pretrained(teacher, dtype=torch.float32).to(device)
        self.work, self.cells, self.levels = work, cells, levels().to(device)
        begun = ZImageTransformer2DModel.from_pretrained(start, dtype=torch.float32).state_dict()
        super().__init__(work / "matching-flow.pt", pipe, pipe.transformer, begun, device)

    def encode(self, texts: list[str]) -> Words:
        return encode_words(self.text, self.tokens(texts))

    def shares(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noise = times.view(-1, 1, 1, 1)
        return 1 - noise, noise

    def velocity(self, name: str, noisy: torch.Tensor, times: torch.Tensor, words: Words) -> torch.Tensor:
        found = self.networks[name](list(noisy.unsqueeze(2).unbind()), 1 - times, words, return_dict=False)[0]
        return torch.stack(found).squeeze(2)

    def clean(self, name: str, noisy: torch.Tensor, times: torch.Tensor, words: Words) -> torch.Tensor:
        return noisy + times.view(-1, 1, 1, 1) * self.velocity(name, noisy, times, words)

    def wanted(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return clean - noise

    def drawn(self, words: Words) -> torch.Tensor:
        last = 0 if torch.rand(()) < 0.5 else int(torch.randint(1, STEPS, ()))
        return self.seen(torch.randn(len(words), 4, self.cells, self.cells).to(self.device), words, last)

    def seen(self, noisy: torch.Tensor, words: Words, last: int) -> torch.Tensor:
        """The picture that the student sees at level `last` of its own way from pure noise."""
        at = self.levels[:, None].expand(-1, len(words))
        with torch.no_grad():
            for step in range(last):
                way = self.levels[step] - self.levels[step + 1]
                noisy = noisy + way * self.velocity("student", noisy, at[step], words)
        return self.clean("student", noisy, at[last], words)

    def show(self) -> None:
        self.pipe.transformer = self.networks["student"]
        distilled(self.pipe, self.work)


if __name__ == "__main__":
    committed = Path("assets/picturebook-transformer")
    parser = arguments(__doc__ or "", minutes=60)
    parser.set_defaults(work=Path(".train/transformer"))
    parser.add_argument("--teacher", type=folder, default=committed)
    parser.add_argument("--from", dest="start", type=folder, default=committed / "few-steps")
    parser.add_argument("--batch", type=int, default=BATCH, help="drawings a step, of all processes; 512 on a GPU")
    args = parser.parse_args()
    processes()
    training = FewSteps(args.work, args.teacher, args.start, args.device)
    for network in training.networks.values():
        compile_blocks(network, args.device)
    training.run(args.minutes, args.batch)
