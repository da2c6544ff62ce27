"""Measure PPO on CartPole-v1 to a mean return of 475 over 100 episodes: ``python -m bench ppo``.

``engine/examples/ppo.py``, whose updates are fused steps, beside stable-baselines3 with the same settings on the same
processor: 8 environments, 32 steps a rollout, 20 passes over batches of 256 rows, two hidden layers of 64 tanh units
each for the policy and for its value. Rate and clipping fall in a line over 100,000 steps with stable-baselines3, as in
its zoo, and stay in the example. Each training has a process of one thread. The seconds are of the processor, without
imports. A run that does not reach the goal in 300,000 steps counts as not solved.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from bench.report import Record
from bench.study import ROOT, count, finish, parse, parser, say, table

MOST_STEPS = 300_000
PLAYERS = ("fusemlp", "stable-baselines3")
GOAL, EPISODES = 475.0, 100


def with_fusemlp(seed: int) -> Record:
    """Train the example; return its steps and the mean return of its last 100 episodes."""
    sys.path.insert(0, str(ROOT / "engine/examples"))
    import ppo

    means = ppo.train(seed, MOST_STEPS)
    return {"steps": len(means) * ppo.LENGTH * ppo.ENVIRONMENTS, "mean_return": means[-1]}


def with_stable_baselines3(seed: int) -> Record:
    """Train stable-baselines3's PPO in the same way."""
    import numpy as np
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class UntilSolved(BaseCallback):
        def _on_step(self) -> bool:
            returns = [episode["r"] for episode in self.model.ep_info_buffer]
            return len(returns) < EPISODES or float(np.mean(returns)) < GOAL

    settings: dict[str, Any] = {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8}
    settings |= {"ent_coef": 0.0, "learning_rate": lambda left: 1e-3 * left, "clip_range": lambda left: 0.2 * left}
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 8, seed=seed), seed=seed, device="cpu", **settings)
    done, solved = 0, UntilSolved()
    # the rate falls over 100,000 steps; a run that needs more goes on at half of the first rate, then at a third
    while done < MOST_STEPS:
        model.learn(100_000, callback=solved, reset_num_timesteps=False)
        done, mean = model.num_timesteps, float(np.mean([episode["r"] for episode in model.ep_info_buffer]))
        if mean >= GOAL:
            break
    return {"steps": done, "mean_return": mean}


def child(player: str, seed: int) -> None:
    """Print a line: steps, mean return and processor seconds of a training in this process."""
    import torch

    torch.set_num_threads(1)
    train = with_fusemlp if player == "fusemlp" else with_stable_baselines3
    start = time.process_time()
    figures = train(seed)
    print(json.dumps({"player": player, "seed": seed, **figures, "cpu_seconds": time.process_time() - start}))


def text(lines: Sequence[Record]) -> str:
    """Return the trainings that reached the goal, with medians of their processor seconds and steps, as Markdown."""
    rows = []
    for player in PLAYERS:
        runs = [line for line in lines if line["player"] == player]
        solved = [run for run in runs if run["mean_return"] >= GOAL]
        seconds, steps = (sorted(run[name] for run in solved) for name in ("cpu_seconds", "steps"))
        middle = len(solved) // 2
        figures = [f"{seconds[middle]:.1f}", f"{steps[middle]:,}"] if solved else ["-", "-"]
        each = f"{1e6 * sum(run['cpu_seconds'] for run in runs) / sum(run['steps'] for run in runs):.0f}"
        rows.append([player, f"{len(solved)} of {len(runs)}", *figures, each])
    return table(["", "solved", "seconds, median", "steps, median", "us a step"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    made = parser("ppo", (__doc__ or "").partition("\n")[0])
    made.add_argument("--seeds", type=count, default=5, metavar="N", help="seeds, from 0 on (default: %(default)s)")
    made.add_argument("--child", nargs=2, metavar=("PLAYER", "SEED"), help="one training in this process")
    options = parse(made, arguments)
    if options.child:
        child(options.child[0], int(options.child[1]))
        return 0
    names = {"gymnasium": "gymnasium", "torch": "torch", "stable_baselines3": "stable-baselines3"}
    missing = [package for module, package in names.items() if importlib.util.find_spec(module) is None]
    if missing:
        say(f"not installed: pip install {' '.join(missing)}")
        return 1
    alone = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    lines: list[Record] = []
    for seed in range(options.seeds):
        for player in PLAYERS:
            command = [sys.executable, "-m", "bench", "ppo", "--child", player, str(seed)]
            ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **alone}, stdout=subprocess.PIPE, check=True)
            lines.append(json.loads(ended.stdout.splitlines()[-1]))
            say(f"{player}, seed {seed}: {lines[-1]['cpu_seconds']:.1f} s, mean return {lines[-1]['mean_return']:.1f}")
    finish("ppo", options, lines, text(lines))
    return 0
