"""Efface's methods on predicted noise as the guidance function of a ComfyUI model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from efface.hooks import Method, Prediction

from .attention import AS, LEAVE, UNCONDITIONAL, time, watch
from .texts import Encoder


class Guidance:
    """One method on the predictions of a model.

    ComfyUI predicts the picture D from x = picture + sigma noise, so (x - D) / sigma is the noise of the method's
    formula, for models that predict noise or v, and the velocity of models with rectified flow.

    Args:
        model: the ModelPatcher that is patched.
        clip: encodes the concept.
        method: changes the prediction, such as `efface.SLD`.
    """

    def __init__(self, model: Any, clip: Any, method: Method) -> None:
        encoder = Encoder(clip)
        self.method, self.sampling = method, model.get_model_object("model_sampling")
        encoded = [encoder(text) for text in encoder.erasure_prompts(method, ", ")]
        self.conditions = [[[states, {"pooled_output": pooled}]] for states, pooled in encoded]
        self.memory: dict[str, Any] = {}
        self.waiting: float | None = None  # the sigma of a prediction that was not guided yet
        self.further = False  # whether this prediction is for the concept

    def __deepcopy__(self, memo: dict[int, Any]) -> Guidance:
        return self  # ComfyUI copies the options of a model

    def patch(self, model: Any) -> None:
        """Patches a model. Raises ValueError if another node has replaced its guidance."""
        if "sampler_cfg_function" in model.model_options:
            raise ValueError(
                "Expected a model whose guidance no other node replaces, got one with such a node. Leave it out, or "
                "use one of Efface's nodes for guidance with all concepts."
            )
        model.set_model_sampler_cfg_function(self.guided, disable_cfg1_optimization=True)
        watch(model, self.watched)

    def guided(self, given: dict[str, Any]) -> Tensor:
        """sigma (e_u + s (e_p + change - e_u)), which ComfyUI subtracts from x."""
        if given.get("input_uncond", ()) is None:
            raise ValueError(
                f"{type(self.method).__name__} needs a negative conditioning, got none. Use a guider that has one, "
                "such as CFGGuider; its text may be empty."
            )
        x, sigma = given["input"], given["sigma"]
        size = sigma.reshape(-1, *[1] * (x.ndim - 1))
        now = self._time(sigma, given["model_options"])
        prompt, negative = given["cond"] / size, given["uncond"] / size
        changed = prompt
        if self.method.weight(now):
            concept = (x - self._concept(given)) / size
            seen = Prediction(prompt, negative, concept, float(given["cond_scale"]), now, self.memory)
            changed = prompt + self.method.guide(seen)
        self.waiting = None
        return (negative + given["cond_scale"] * (changed - negative)) * size

    def _concept(self, given: dict[str, Any]) -> Tensor:
        """The picture that the model predicts for the concept: the mean over its texts."""
        model, x, options = given["model"], given["input"], dict(given["model_options"])
        kind = UNCONDITIONAL if self.method.repels else LEAVE
        options["transformer_options"] = {**options.get("transformer_options", {}), AS: kind}
        found, self.further = [], True
        try:
            for condition in self.conditions:
                conds = comfy.sampler_helpers.convert_cond(condition)
                conds = comfy.samplers.encode_model_conds(model.extra_conds, conds, x, x.device, "positive")
                found += comfy.samplers.calc_cond_batch(model, [conds], x, given["sigma"], options)
        finally:
            self.further = False
        return torch.stack(found).mean(0)

    def _time(self, sigma: Tensor, options: dict[str, Any]) -> Tensor:
        """0 is pure noise, 1 the picture; for methods that count steps, the middle of the step as a share of all.
        Empties the memory in the first step."""
        now = float(sigma.flatten()[0])
        sigmas = options.get("transformer_options", {}).get("sample_sigmas")
        if sigmas is None:
            raise RuntimeError(
                "Expected the sigmas of all steps (`sample_sigmas`) from ComfyUI, got none. Use a later version of it."
            )
        steps = sigmas[:-1].tolist()
        step = max(0, sum(each >= now * (1 - 1e-6) for each in steps) - 1)
        if step == 0:
            self.memory.clear()
        if self.method.counts_steps:
            return torch.tensor((step + 0.5) / len(steps), device=sigma.device)
        return time(self.sampling, sigma)

    def watched(self, run: Callable[[], Tensor], sigma: float) -> Tensor:
        """One call of the denoiser. Raises RuntimeError if the step before was not guided."""
        if not self.further:
            if self.waiting is not None and sigma < self.waiting:  # a larger sigma starts another picture
                raise RuntimeError(
                    f"A step was drawn without {type(self.method).__name__}: the guider does not call the guidance "
                    "function of the model, or a later node replaced it. Use KSampler or CFGGuider, and put Efface's "
                    "node last."
                )
            self.waiting = sigma
        return run()
