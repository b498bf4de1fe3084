"""A rollout row, values and a command line with secrets, for the tests of run folders and reports."""

from togi.obs.run_dir import Resolved

KEY = "0123456789abcdef0123456789abcdef01234567"
VALUES = {
    "pretrain": Resolved("some/model", "command line"),
    "learning_rate": Resolved(1e-6, "file"),
    "max_len": Resolved(None, "default"),
    "prompt_data": Resolved(("a", "b"), "command line"),
    "text": Resolved("two\nlines # and: yaml", "default"),
    "zero_stage": Resolved(2, "auto"),
    "use_wandb": Resolved(KEY, "command line"),
    "remote_rm_url": Resolved("http://me:secret-word@host/score", "command line"),
}
ARGV = ["togi", "train_ppo_ray", "--use_wandb", KEY, f"--use_wandb={KEY}", "--packing_samples"]


def row(index=0, text="Hello <|im_end|>", **others):
    return {
        "group_id": "g0",
        "prompt_id": "p0",
        "sample_index": index,
        "datasource": "gsm8k",
        "prompt_text": "Say 日本",
        "response_text": text,
        "label": '{"answer": 42}',
        "prompt_tokens": [1, 2, 128255],
        "response_tokens": [7, 8, 9],
        "response_mask": [True, False, True],
        "rollout_logprobs": [-0.5, -1.25, -2.0],
        "trainer_logprobs": [-0.5, -1.0, -2.5],
        "ref_logprobs": [],
        "advantages": [1.5, 0.0, 1.5],
        "reward": 0.1,
        "components": {"format": 1.0, "correct": -0.1},
        "outcome": "score",
        "finish_reason": "stop",
        "policy_version": 4,
        "versions": [3, 3, 4],
        "forks": [[5, 3]],
        "turn_rewards": [[0.0, 0.5]],
        "messages": '[{"role": "user", "content": "日本"}]',
        "counts": {"turns": 2.0},
        "filtered": False,
        **others,
    }
