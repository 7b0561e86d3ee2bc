"""A bundle's file as another program would use it."""

from pathlib import Path

import numpy as np
import onnxruntime


class Session:
    """Plain ONNX Runtime and the contract's names, as a stranger would use them."""

    def __init__(self, folder: Path) -> None:
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        past = [value for value in self.session.get_inputs() if value.name.startswith("past_key_values.")]
        self.layers, (_, self.heads, _, self.head_dim) = len(past) // 2, past[0].shape

    def logits(self, ids: np.ndarray, steps: tuple[int, ...], mask: np.ndarray | None = None) -> np.ndarray:
        mask = np.ones_like(ids) if mask is None else mask
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        names = [f"{i}.{part}" for i in range(self.layers) for part in ("key", "value")]
        past = [np.zeros((len(ids), self.heads, 0, self.head_dim), np.float32)] * len(names)
        start, parts = 0, []
        for step in steps:
            end = start + step
            feeds = {
                "input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "position_ids": positions[:, start:end]
            } | {f"past_key_values.{name}": value for name, value in zip(names, past, strict=True)}  # fmt: skip
            logits, *past = self.session.run(["logits", *(f"present.{name}" for name in names)], feeds)
            assert past[0].shape == (len(ids), self.heads, end, self.head_dim)
            parts.append(logits)
            start = end
        return np.concatenate(parts, axis=1)
