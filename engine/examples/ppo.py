"""Proximal policy optimization on CartPole-v1, to a mean return of 475 over 100 episodes.

    pip install gymnasium
    python engine/examples/ppo.py

The loss of the policy is a function of its logits and of what the rollout noted. ``fuse`` calls it between the kernels'
forward and backward pass. The critic's loss is torch's own, so its whole step is fused.

Source: Schulman et al., 2017; advantages as in Schulman et al., 2016.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from fusemlp.torch import fuse

ENVIRONMENTS, LENGTH = 8, 32
DISCOUNT, TRACE = 0.98, 0.8
PASSES, CLIP = 20, 0.2
GOAL, EPISODES = 475.0, 100


class Rollout(NamedTuple):
    """Transitions in order, without those that only reset an environment: states (m, 4), and (m,) of the others."""

    states: Tensor
    actions: Tensor
    log_probabilities: Tensor
    advantages: Tensor
    returns: Tensor


def network(outputs: int) -> nn.Sequential:
    """Return a network of 4 inputs and two hidden layers."""
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


def log_probability(logits: Tensor, actions: Tensor) -> Tensor:
    """Return the logarithm (m,) of the probability of each action."""
    return logits.log_softmax(1).gather(1, actions[:, None]).squeeze(1)


def clipped_surrogate(logits: Tensor, actions: Tensor, before: Tensor, advantages: Tensor) -> Tensor:
    """Return the policy's loss: its gain ends where the probability of an action has changed by the share CLIP."""
    ratio = torch.exp(log_probability(logits, actions) - before)
    clipped = ratio.clamp(1.0 - CLIP, 1.0 + CLIP)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def estimate_advantages(
    values: np.ndarray[Any, Any], rewards: np.ndarray[Any, Any], terminated: np.ndarray[Any, Any], ended: Any
) -> np.ndarray[Any, Any]:
    """Return the advantages (LENGTH, ENVIRONMENTS) from values (LENGTH + 1, ENVIRONMENTS)."""
    advantages = np.zeros_like(rewards)
    later = np.zeros(ENVIRONMENTS, np.float32)
    for step in reversed(range(LENGTH)):
        error = rewards[step] + DISCOUNT * values[step + 1] * ~terminated[step] - values[step]
        later = error + DISCOUNT * TRACE * later * ~ended[step]
        advantages[step] = later
    return advantages


def rollouts(actor: nn.Module, critic: nn.Module, seed: int, returns: deque[float]) -> Iterator[Rollout]:
    """Yield what the policy of the moment does; ``returns`` gets the sums of rewards of the episodes that end."""
    environments = gymnasium.make_vec("CartPole-v1", num_envs=ENVIRONMENTS, vectorization_mode="vector_entry_point")
    state, _ = environments.reset(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    # the step after an end resets an environment, and belongs to no episode
    resets, sums = np.zeros(ENVIRONMENTS, bool), np.zeros(ENVIRONMENTS)
    shape = LENGTH, ENVIRONMENTS
    states, rewards = np.zeros((LENGTH + 1, ENVIRONMENTS, 4), np.float32), np.zeros(shape, np.float32)
    terminated, ended, valid = (np.zeros(shape, bool) for _ in range(3))
    actions, before = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    while True:
        for step in range(LENGTH):
            states[step] = state
            with torch.no_grad():
                logits = actor(torch.from_numpy(state))
                action = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
                before[step] = log_probability(logits, action)
            actions[step], valid[step] = action, ~resets
            state, rewards[step], terminated[step], truncated, _ = environments.step(action.numpy())
            ended[step] = resets = terminated[step] | truncated
            sums += rewards[step]
            returns.extend(sums[resets].tolist())
            sums[resets] = 0.0
        states[LENGTH] = state
        with torch.no_grad():
            values = critic(torch.from_numpy(states)).squeeze(2).numpy()
        advantages = estimate_advantages(values, rewards, terminated, ended)
        kept = torch.from_numpy(valid)
        advantage, target = (torch.from_numpy(array)[kept] for array in (advantages, advantages + values[:-1]))
        yield Rollout(
            torch.from_numpy(states[:-1])[kept],
            actions[kept],
            before[kept],
            (advantage - advantage.mean()) / advantage.std(),
            target[:, None],
        )


def train(seed: int = 0, most_steps: int = 300_000) -> list[float]:
    """Train until the mean return of the last EPISODES episodes is GOAL; return these means after each rollout."""
    torch.manual_seed(seed)
    actor, critic = network(2), network(1)
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (actor, critic)]
    update_actor = fuse(actor, clipped_surrogate, optimizers[0], clip_grad_norm=0.5)
    update_critic = fuse(critic, nn.MSELoss(), optimizers[1], clip_grad_norm=0.5)
    returns: deque[float] = deque(maxlen=EPISODES)
    means: list[float] = []
    for rollout in rollouts(actor, critic, seed, returns):
        for _ in range(PASSES):
            update_actor(rollout.states, rollout.actions, rollout.log_probabilities, rollout.advantages)
            update_critic(rollout.states, rollout.returns)
        means.append(float(np.mean(returns)) if returns else 0.0)
        reached = len(returns) == EPISODES and means[-1] >= GOAL
        if reached or len(means) * LENGTH * ENVIRONMENTS >= most_steps:
            return means
    raise AssertionError("rollouts do not end")


if __name__ == "__main__":
    start = time.perf_counter()
    means = train()
    for number in range(0, len(means), 50):
        print(f"{number * LENGTH * ENVIRONMENTS:7d} steps: mean return {means[number]:5.1f}")
    print(f"{len(means) * LENGTH * ENVIRONMENTS:7d} steps: mean return {means[-1]:5.1f}")
    print(f"{time.perf_counter() - start:.1f} s")
