"""Train an adapter in the code space of a frozen SAE, so that a frozen language model prefers one continuation to another.

    python examples/adapter.py RUN --prefer " happy" --to " sad" --text "Today I am" "My friend is"

The adapter reads the activations at the SAE's hook and adds a vector to the codes; the SAE's reconstruction error stays in the
activations. This is the setting of FSRL (arXiv 2509.12934), in our own small version: one linear layer, and SimPO's loss
(arXiv 2405.14734) on a few pairs. RUN is the folder of a run, or of one arm.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.saes import load_sae
from metasae_lightning.evaluation.steering import steer
from metasae_lightning.lm.embedded_model import EMBEDDED, embedded_folder


class Adapter(nn.Module):
    """A frozen SAE, and a linear layer from the activations to a vector that is added to its codes. At first it changes nothing."""

    def __init__(self, sae) -> None:
        super().__init__()
        self.sae, self.layer = sae, nn.Linear(sae.cfg.d_in, sae.cfg.d_sae)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The steered activations. `added` keeps the vector, for its L1 norm."""
        rows = x.flatten(0, -2)
        self.added = self.layer(rows)
        return steer(rows, self.sae, lambda acts: acts + self.added).view_as(x)


def log_probability(model, prompt: Tensor, answer: Tensor) -> Tensor:
    """The mean log-probability of an answer's tokens after a prompt."""
    tokens = torch.cat([prompt, answer])
    log_probabilities = model(tokens[None], use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return log_probabilities.gather(-1, answer[:, None]).mean()


def train(model, module: nn.Module, sae, pairs, *, steps: int, lr: float, l1: float, beta: float = 2.0, margin: float = 1.0) -> list[float]:
    """Train an adapter at a module of the model, and return the losses. A pair has a prompt, the preferred answer and the other one."""
    adapter, losses = Adapter(sae), list[float]()
    steered = lambda _, __, out: adapter(out) if isinstance(out, Tensor) else (adapter(out[0]), *out[1:])  # noqa: E731
    handle, optimizer = module.register_forward_hook(steered), torch.optim.Adam(adapter.layer.parameters(), lr)
    for _ in range(steps):
        loss = torch.zeros(())
        for prompt, preferred, other in pairs:
            gap = log_probability(model, prompt, preferred) - log_probability(model, prompt, other)
            loss = loss - logsigmoid(beta * gap - margin) / len(pairs) + l1 * adapter.added.abs().sum(-1).mean() / len(pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    handle.remove()
    return losses


def main(args: list[str] | None = None) -> None:
    """Print the loss before and after training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--text", nargs="+", default=["Today I am", "My friend is"], help="prompts")
    parser.add_argument("--prefer", default=" happy")
    parser.add_argument("--to", default=" sad")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--l1", type=float, default=2e-2, help="weight of the L1 norm of the vector that is added to the codes")
    options = parser.parse_args(args)
    try:
        subject = load_sae(str(options.run))
    except InputError as error:
        raise SystemExit(str(error)) from error
    name, hook = subject.metadata["model_name"], subject.metadata["hf_hook_name"]
    name = embedded_folder() if name == EMBEDDED else name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name).requires_grad_(False), AutoTokenizer.from_pretrained(name)
    prompt, preferred, other = (
        [tokenizer(text, return_tensors="pt", add_special_tokens=special).input_ids[0] for text in texts]
        for texts, special in ((options.text, True), ([options.prefer], False), ([options.to], False))
    )
    pairs = [(tokens, preferred[0], other[0]) for tokens in prompt]
    losses = train(model, model.get_submodule(hook), subject.sae, pairs, steps=options.steps, lr=options.lr, l1=options.l1)
    print(f"loss before training {losses[0]:.3f}, after {len(losses)} steps {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
