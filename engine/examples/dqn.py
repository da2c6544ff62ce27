"""Deep Q-learning on CartPole-v1, to a mean return of 150 over 20 episodes; ppo.py balances the pole for good.

    pip install gymnasium
    python engine/examples/dqn.py

The loss takes the value of the action that was taken out of the network's outputs. It is a function, which ``fuse``
calls between the kernels' forward and backward pass.

Source: Mnih et al., 2015; the target's action is the network's own, as in van Hasselt et al., 2016.
"""

from __future__ import annotations

import copy
import time
from collections import deque

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fusemlp.torch import fuse

ENVIRONMENTS, BATCH, CAPACITY = 8, 128, 50_000
DISCOUNT, RATE = 0.99, 1e-3
# the share of random actions falls to its least over this many calls of the environments
LEAST_RANDOM, EXPLORING = 0.02, 500
# updates after each call, and calls between copies to the target network
UPDATES, COPIED = 2, 100
EPISODES = 20


def error_of_actions(values: Tensor, actions: Tensor, targets: Tensor) -> Tensor:
    """Return the Huber loss of values (m, 2) at the actions (m, 1) against targets (m, 1)."""
    return functional.smooth_l1_loss(values.gather(1, actions), targets)


class Replay:
    """The last CAPACITY transitions."""

    def __init__(self) -> None:
        self.states, self.next_states = torch.zeros(2, CAPACITY, 4)
        self.actions = torch.zeros(CAPACITY, 1, dtype=torch.int64)
        self.rewards, self.going = torch.zeros(2, CAPACITY, 1)
        self.count = 0

    def add(self, state: Tensor, action: Tensor, reward: Tensor, next_state: Tensor, going: Tensor) -> None:
        """Keep transitions (m, ...) in place of the oldest."""
        places = torch.arange(self.count, self.count + len(state)) % CAPACITY
        columns = self.states, self.actions, self.rewards, self.next_states, self.going
        for column, values in zip(columns, (state, action, reward, next_state, going), strict=True):
            column[places] = values.reshape(len(places), -1)
        self.count += len(state)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return the places of a batch."""
        return torch.randint(0, min(self.count, CAPACITY), (BATCH,), generator=generator)


def train(seed: int = 0, calls: int = 4_000, goal: float = 150.0) -> list[float]:
    """Train until the mean return of the last EPISODES episodes is ``goal``; return these means after each call."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    target_network = copy.deepcopy(network)
    step = fuse(network, error_of_actions, torch.optim.Adam(network.parameters(), lr=RATE), clip_grad_norm=10.0)
    environments = gymnasium.make_vec("CartPole-v1", num_envs=ENVIRONMENTS, vectorization_mode="vector_entry_point")
    state, _ = environments.reset(seed=seed)
    replay = Replay()
    # the call after an end resets an environment, and belongs to no episode
    resets, sums = np.zeros(ENVIRONMENTS, bool), np.zeros(ENVIRONMENTS)
    returns: deque[float] = deque(maxlen=EPISODES)
    means: list[float] = []
    for call in range(calls):
        x, valid = torch.from_numpy(state), torch.from_numpy(~resets)
        with torch.no_grad():
            action = network(x).argmax(1)
        random = torch.rand(ENVIRONMENTS, generator=generator) < max(LEAST_RANDOM, 1.0 - call / EXPLORING)
        action[random] = torch.randint(0, 2, (int(random.sum()),), generator=generator)
        state, reward, terminated, truncated, _ = environments.step(action.numpy())
        going = torch.from_numpy(~terminated).float()
        transition = x, action, torch.from_numpy(reward), torch.from_numpy(state), going
        replay.add(*(part[valid] for part in transition))
        resets = terminated | truncated
        sums += reward
        returns.extend(sums[resets].tolist())
        sums[resets] = 0.0
        for _ in range(UPDATES):
            rows = replay.draw(generator)
            with torch.no_grad():
                next_state = replay.next_states[rows]
                best = network(next_state).argmax(1, keepdim=True)
                later = target_network(next_state).gather(1, best)
                targets = replay.rewards[rows] + DISCOUNT * replay.going[rows] * later
            step(replay.states[rows], replay.actions[rows], targets)
        if call % COPIED == 0:
            target_network.load_state_dict(network.state_dict())
        means.append(float(np.mean(returns)) if returns else 0.0)
        if len(returns) == EPISODES and means[-1] >= goal:
            break
    return means


if __name__ == "__main__":
    start = time.perf_counter()
    means = train()
    for number in [*range(0, len(means), 500), len(means) - 1]:
        print(f"{(number + 1) * ENVIRONMENTS:6d} steps: mean return {means[number]:5.1f}")
    print(f"{time.perf_counter() - start:.1f} s")
