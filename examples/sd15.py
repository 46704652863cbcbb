"""Stable Diffusion 1.5 on a GPU: the same prompt without and with an eraser, side by side.

    python examples/sd15.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --out sd15.png
    python examples/sd15.py --tiny --concept cat --prompt "a red cat" --out sd15.png     # the code path, on a CPU

This script was not run on a GPU or with published weights by those who wrote it. Its code path is tested with a tiny
pipeline of random weights. Its weights take about 2 GB in half precision.
"""

from __future__ import annotations

import argparse

import torch

import efface

EXPECT = """\
What to expect, if all is well:
- The first row is the base model, the second one has the concept erased. Both have the same seeds.
- In the second row the concept is missing, and the rest of the scene is similar.
- EIUP edits cross-attention in its projected form. Its strength was chosen on a small model.
- If nothing changes, raise --strength. If pictures are ruined, lower it. `efface calibrate` looks for a strength with a
  detector of yours. A picture is no measurement: `efface bench` and `efface audit` measure rates.
This script was not run on a GPU by its authors: please report what you see."""


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description="Stable Diffusion 1.5: a prompt without and with an eraser.")
    made.add_argument(
        "--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="a folder, a checkpoint or a hub id"
    )
    made.add_argument("--tiny", action="store_true", help="a tiny random pipeline in place of the model, on the CPU")
    made.add_argument("--prompt", default="a night at the pub")
    made.add_argument("--concept", default="alcohol", help="see `efface list concepts`")
    made.add_argument("--strength", type=float, help="default: EIUP's")
    made.add_argument("--images", type=int, default=4)
    made.add_argument("--out", default="sd15.png")
    given = made.parse_args(arguments)
    if given.tiny:
        from efface.testing import pipeline

        pipe, call = pipeline("sd1"), {"num_inference_steps": 2}
    else:
        pipe = efface.load(given.model, dtype="fp16", device="cuda", allow_hub=True)
        call = {"num_inference_steps": 30, "guidance_scale": 7.5}
    pipe.set_progress_bar_config(disable=given.tiny)
    fields = {} if given.strength is None else {"strength": given.strength}

    def draw() -> list[object]:
        generators = [torch.Generator().manual_seed(4_000_000 + k) for k in range(given.images)]
        return list(pipe([given.prompt] * given.images, generator=generators, **call).images)

    print(EXPECT)
    base = draw()
    with efface.erase(pipe, given.concept, **fields) as handle:
        erased = draw()
        print("denoiser calls with the eraser:", handle.record["calls"])
    efface.grid({"base model": base, "EIUP": erased}, side=512).save(given.out)
    print("Written:", given.out)


if __name__ == "__main__":
    main()
