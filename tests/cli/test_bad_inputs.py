"""Bad input of every kind: one line on stderr that names what is wrong, status 2, and nothing changed on disk."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ist.cli.main import main

ROWS = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(4)]

FILES: dict[str, str | bytes] = {
    # recipes
    "broken.yaml": "a: [1\n",
    "tabs.yaml": "a:\n\t- 1\n",
    "list.yaml": "- 1\n",
    "text.yaml": "hello",
    "empty.yaml": "",
    "binary.yaml": b"\xff\xfe\x00\x01",
    "unknown.yaml": "leaning_rate: 3\n",
    "number-key.yaml": "3: 4\n",
    "nothing.yaml": "learning_rate:\n",
    "word.yaml": "max_steps: many\n",
    "half.yaml": "num_train_problems: 1.5\n",
    "choice.yaml": "save_strategy: often\n",
    "method.yaml": "method: best\n",
    "overwrite.yaml": "overwrite: true\n",
    "code.yaml": "trust_remote_code: true\n",
    "env.yaml": "env: {LD_PRELOAD: x}\n",
    "outside.yaml": "data_files: [/etc/passwd]\n",
    "parent.yaml": "data_files: [../rows.json]\n",
    "folder.yaml": "output_dir: elsewhere\n",
    "reporter.yaml": "report_to: wandb\n",
    "self.yaml": "data_files: &a [*a]\n",
    "deep.yaml": "data_files: " + "[" * 900 + "]" * 900 + "\n",
    "huge.yaml": "max_steps: 1" + "0" * 5000 + "\n",
    "flag.yaml": "lora_target_modules: [q_proj, --overwrite]\n",
    "both.yaml": "cost_exponent: 1\nprice: 1\ntask: word-problems\n",
    "wide.yaml": "a: x\n" * 30_000,
    # data
    "rows.json": json.dumps(ROWS),
    "broken.json": '[{"instruction": "Hi"',
    "empty.json": "",
    "no-rows.json": "[]",
    "number.json": "3",
    "texts.json": '["Hi"]',
    "fields.json": '[{"instruction": "Hi"}]',
    "other-type.json": '[{"instruction": "Hi", "output": ["a", {"b": 1}]}]',
    "nulls.json": '[{"instruction": null, "output": null}]',
    "binary.json": b"\x89PNG\r\n\x1a\n\x00",
    "broken.jsonl": '{"instruction": "a", "output": "b"}\n{"instruction"\n',
    "fields.jsonl": '{"instruction": "a", "output": "b"}\n{"question": "a"}\n',
    "fields.csv": "question,answer\na,b\n",
    "empty.csv": "",
    "rows.xyz": "hello",
    "broken.gz.jsonl.gz": b"\x1f\x8b broken",
    "cut.jsonl.gz": gzip.compress(json.dumps(ROWS[0]).encode(), mtime=0)[:-12],
    "broken.parquet": b"PAR1 no",
    "roles.json": '[{"messages": [{"role": "user"}]}]',
    "no-answer.json": '[{"messages": [{"role": "user", "content": "Hi"}]}]',
    "set/train.jsonl": '{"question": "Hi", "answer": "Ho"}\n',
    # models and adapters
    "no-config/model.safetensors": b"",
    "bad-config/config.json": "{",
    "list-config/config.json": "[]",
    "unknown-model/config.json": '{"model_type": "mystery"}',
    "xlora.json": '{"peft_type": "XLORA", "hidden_size": 8}',
    "bad-adapter/adapter_config.json": "{",
    "unknown-adapter/adapter_config.json": '{"peft_type": "MYSTERY"}',
    "no-type/adapter_config.json": "{}",
    # runs
    "finished/ist_result.json": "{}",
    "finished/adapter_config.json": "{}",
    "broken-run/ist_result.json": "{",
    "broken-run/adapter_config.json": "{}",
    "list-run/ist_result.json": "[]",
    "list-run/adapter_config.json": "{}",
    "text-run/ist_result.json": '{"arguments": "--lora_r 4"}',
    "text-run/adapter_config.json": "{}",
    "code-run/ist_result.json": '{"arguments": ["--trust_remote_code"]}',
    "code-run/adapter_config.json": "{}",
    "stopped/checkpoint-3/trainer_state.json": "{",
    "empty-history/ist_history.jsonl": "",
    "list-history/ist_history.jsonl": "[1]\n",
    # comparisons
    "no-methods.yaml": "seeds: [0]\n",
    "methods-list.yaml": "methods: [a, b]\n",
    "seeds.yaml": "methods: {a: {}}\nseeds: [0, 0]\n",
    "against.yaml": "methods: {a: {against: b}}\n",
    "own.yaml": "methods: {a: {seed: 3}}\n",
    "rates.yaml": "methods: {a: {learning_rates: [0]}}\n",
    "same.yaml": "methods: {a b: {}, a-b: {}}\n",
    "budget.yaml": "methods: {a: {}}\nbudget: dollars\n",
    "unknown-flag.yaml": "methods: {a: {lr: 1}}\n",
    "compare-code.yaml": "methods: {a: {trust_remote_code: true}}\n",
    "evaluation.yaml": "methods: {a: {}}\nevaluation: {task_folder: x}\n",
    "eval-key.yaml": "methods: {a: {}}\nevaluation: {taskz: [boolq]}\n",
    "eval-list.yaml": "methods: {a: {}}\nevaluation: [boolq]\n",
}

MODEL = ["--model_name_or_path=x", "--use_cpu", "--bf16=false"]
TRAIN = ["train", *MODEL, "--task=word-problems"]
DATA = ["train", *MODEL]
EVAL = ["eval", "--model_name_or_path=x"]

# fmt: off
CASES: list[tuple[list[str], str]] = [
    # ---- commands
    (["tune"], "there is no command 'tune'"),
    (["trian"], "there is no command 'trian' (did you mean train?): choose one of train, "),
    (["--verbose"], "there is no command '--verbose'"),
    ([""], "there is no command ''"),
    # ---- flags of other programs, and typing errors
    ([*TRAIN, "--lr=1"], "no flag --lr (did you mean --learning_rate?): `ist train --help-all` lists"),
    ([*TRAIN, "--leaning_rate=1"], "no flag --leaning_rate (did you mean --learning_rate?)"),
    ([*TRAIN, "--model=y"], "no flag --model (did you mean --model_name_or_path?)"),
    ([*TRAIN, "--model_name=y"], "(did you mean --model_name_or_path?)"),
    ([*TRAIN, "--base_model=y"], "(did you mean --model_name_or_path?)"),
    ([*TRAIN, "--lora_rank=4"], "no flag --lora_rank (did you mean --lora_r?)"),
    ([*TRAIN, "--rank=4"], "(did you mean --lora_r?)"),
    ([*TRAIN, "--alpha=4"], "(did you mean --lora_alpha?)"),
    ([*TRAIN, "--target_modules=q_proj"], "(did you mean --lora_target_modules?)"),
    ([*TRAIN, "--torch_dtype=float32"], "no flag --torch_dtype (did you mean --dtype?)"),
    ([*TRAIN, "--batch_size=4"], "(did you mean --per_device_train_batch_size?)"),
    ([*TRAIN, "--epochs=4"], "(did you mean --num_train_epochs?)"),
    ([*TRAIN, "--steps=4"], "(did you mean --max_steps?)"),
    ([*TRAIN, "--max_seq_length=4"], "(did you mean --max_length?)"),
    ([*TRAIN, "--cutoff_len=4"], "(did you mean --max_length?)"),
    ([*TRAIN, "--train_file=4"], "(did you mean --data_files?)"),
    ([*TRAIN, "--output=4"], "(did you mean --output_dir?)"),
    ([*TRAIN, "--val_size=4"], "There is no flag --val_size"),
    ([*TRAIN, "--no_such_flag"], "There is no flag --no_such_flag"),
    ([*TRAIN, "stray"], "'stray' belongs to no flag: write --FLAG before a value"),
    (["train", "quickstart"], "a recipe is given as `ist train --recipe quickstart`, and `ist train --help` lists"),
    (["train", "set"], "'set' belongs to no flag: a model is given as `ist train --model_name_or_path set`"),
    # ---- commas between values
    ([*DATA, "--data_files=rows.json,set/train.jsonl"], "between them: --data_files rows.json set/train.jsonl."),
    ([*TRAIN, "--lora_target_modules=q_proj,v_proj"], "have spaces between them: --lora_target_modules q_proj v_proj."),
    ([*TRAIN, "--lora_target_modules", "q_proj,", "v_proj,up_proj"], "v_proj,up_proj has commas, and several values"),
    ([*TRAIN, "--lora_target_modules=" + ",".join(["q_proj"] * 60)], "q_proj has commas, and several values have spa"),
    (["train", "model" * 60], "belongs to no flag: a recipe is given as `ist train --recipe modelmodel"),
    ([*TRAIN, "--adapter=" + "lora" * 80], "is unknown: choose one of lora"),
    ([*TRAIN, "--lora_modules_to_save=lm_head,embed_tokens"], "--lora_modules_to_save lm_head embed_tokens."),
    ([*TRAIN, "--adapter=series", "--bottleneck_target_modules=mlp,o_proj"], "_target_modules mlp o_proj."),
    ([*TRAIN, "--report_to=tensorboard,wandb"], "--report_to tensorboard wandb."),
    ([*EVAL, "--data_files=rows.json,b.json"], "--data_files rows.json b.json."),
    (["compare", "--recipe=quick", "--methods=LoRA,IST"], "--methods LoRA IST."),
    (["compare", "--recipe=quick", "--seeds=0,1"], "--seeds 0,1 has commas, and several values have spaces between"),
    ([*TRAIN, "-x"], "There is no flag -x"),
    # ---- values of flags
    ([*TRAIN, "--max_steps=many"], "--max_steps many is not allowed: give a whole number."),
    ([*TRAIN, "--max_steps=1.5"], "--max_steps 1.5 is not allowed: give a whole number."),
    ([*TRAIN, "--max_steps"], "--max_steps needs a value: give a whole number."),
    ([*TRAIN, "--learning_rate=fast"], "--learning_rate fast is not allowed: give a number."),
    ([*TRAIN, "--learning_rate=nan"], "learning_rate=nan is not allowed"),
    ([*TRAIN, "--learning_rate=inf"], "learning_rate=inf is not allowed"),
    ([*TRAIN, "--learning_rate=-1"], "learning_rate=-1.0 is not allowed"),
    ([*TRAIN, "--weight_decay=-1"], "weight_decay=-1.0 is not allowed"),
    ([*TRAIN, "--max_grad_norm=nan"], "max_grad_norm=nan is not allowed"),
    ([*TRAIN, "--label_smoothing_factor=2"], "label_smoothing_factor=2.0 is not allowed"),
    ([*TRAIN, "--adam_beta1=1.5"], "adam_beta1=1.5 is not allowed"),
    ([*TRAIN, "--num_train_epochs=-3"], "num_train_epochs=-3.0 is not allowed"),
    ([*TRAIN, "--num_train_epochs=0"], "num_train_epochs=0.0 is not allowed: give a finite number above 0."),
    ([*TRAIN, "--max_steps=0"], "max_steps=0 is not allowed: give a whole number of at least 1, or -1 for epochs."),
    ([*TRAIN, "--max_steps=-5"], "max_steps=-5 is not allowed"),
    ([*TRAIN, "--warmup_steps=-3"], "warmup_steps"),
    ([*TRAIN, "--lora_dropout=2"], "lora_dropout=2.0 is not allowed"),
    ([*TRAIN, "--lora_r=0"], "lora_r=0"),
    ([*TRAIN, "--lora_r=-4"], "lora_r=-4"),
    ([*TRAIN, "--per_device_train_batch_size=0"], "per_device_train_batch_size=0"),
    ([*TRAIN, "--gradient_accumulation_steps=0"], "gradient_accumulation_steps=0"),
    ([*TRAIN, "--logging_steps=-1"], "logging_steps"),
    ([*TRAIN, "--save_steps=-1"], "save_steps"),
    ([*TRAIN, "--max_length=0"], "max_length=0"),
    ([*TRAIN, "--max_length=-5"], "max_length=-5"),
    ([*TRAIN, "--seed=-1"], "seed=-1"),
    ([*TRAIN, "--use_cpu=perhaps"], "--use_cpu perhaps is not allowed: give true or false."),
    ([*TRAIN, "--dtype=float8"], "--dtype float8 is unknown (did you mean float32?): give one of auto, bfloat16"),
    ([*TRAIN, "--optim=sgdd"], "--optim sgdd is unknown (did you mean sgd?): give one of adamw_torch, "),
    ([*TRAIN, "--lr_scheduler_type=wavy"], "--lr_scheduler_type wavy is unknown: give one of linear, "),
    ([*TRAIN, "--save_strategy=often"], "often"),
    ([*TRAIN, "--eval_strategy=often"], "often"),
    ([*TRAIN, "--lr_scheduler_kwargs={"], "lr_scheduler_kwargs"),
    ([*TRAIN, "--lr_scheduler_kwargs=[1]"], "lr_scheduler_kwargs"),
    ([*TRAIN, "--bf16=true", "--fp16=true"], "bf16 is on"),
    ([*TRAIN, "--load_in_4bit", "--load_in_8bit"], "8 bit and 4 bit"),
    ([*TRAIN, "--report_to=wandbb"], "report_to='wandbb' is unknown"),
    ([*TRAIN, "--report_to=clearml"], "--report_to clearml needs the package clearml"),
    ([*TRAIN, "--report_to", "tensorboard", "neptune"], "neptune"),
    # ---- the method
    ([*TRAIN, "--method=best"], "method='best' is unknown: choose one of 'ist', 'random', "),
    ([*TRAIN, "--adapter=prefix"], "adapter='prefix' is unknown: choose"),
    ([*TRAIN, "--method=IST"], "method='IST' is unknown (did you mean 'ist'?): choose one of 'ist', "),
    ([*TRAIN, "--adapter=LoRA"], "adapter='LoRA' is unknown (did you mean lora?): choose one of lora, "),
    ([*TRAIN, "--adapter=xlora"], "adapter='xlora' is unknown"),
    ([*TRAIN, "--adapter=xlora.json"], "is of XLORA, which mixes adapters that it loads: give another type."),
    ([*TRAIN, "--chat_template_path=none.jinja"], "There is no chat template none.jinja (looked for /"),
    ([*TRAIN, "--chat_template_path=./none"], "There is no chat template ./none"),
    ([*TRAIN, "--preset=robust"], "preset='robust' is unknown"),
    ([*TRAIN, "--policy=best"], "policy='best' is unknown"),
    ([*TRAIN, "--recompute=some"], "recompute='some' is unknown"),
    ([*TRAIN, "--optimizer_state=lose"], "optimizer_state='lose' is unknown"),
    ([*TRAIN, "--num_active_layers=0"], "num_active_layers=0 is neither a count"),
    ([*TRAIN, "--num_active_layers=1.5"], "num_active_layers=1.5 is neither a count"),
    ([*TRAIN, "--num_active_layers=nan"], "num_active_layers=nan is neither a count"),
    ([*TRAIN, "--num_active_layers=few"], "num_active_layers='few' is not a number"),
    ([*TRAIN, "--num_unsuppressed_layers=-1"], "num_unsuppressed_layers=-1 is neither a count"),
    ([*TRAIN, "--num_candidates=1"], "num_candidates=1 is not a whole number of at least 2"),
    ([*TRAIN, "--update_interval=0"], "update_interval=0 is not a whole number"),
    ([*TRAIN, "--beta=2"], "beta=2.0 is not a number in [0, 1]"),
    ([*TRAIN, "--beta=nan"], "beta=nan is not a number in [0, 1]"),
    ([*TRAIN, "--mu=-1"], "mu=-1.0 is not a finite number"),
    ([*TRAIN, "--mu=inf"], "mu=inf is not a finite number"),
    ([*TRAIN, "--probe_batch_size=0"], "probe_batch_size=0 is not a whole number"),
    ([*TRAIN, "--greedy_steps=0"], "greedy_steps=0 is not a whole number"),
    ([*TRAIN, "--method=fixed"], "--method fixed needs --fixed_layers"),
    ([*TRAIN, "--method=lisa", "--adapter=lora"], "--adapter lora does not go with it"),
    ([*TRAIN, "--method=ist", "--adapter=none"], "it does not go with --adapter none"),
    ([*TRAIN, "--method=full", "--load_in_4bit"], "quantised ones cannot be"),
    ([*TRAIN, "--adapter=adalora"], "--adapter adalora needs --max_steps"),
    ([*TRAIN, "--adapter=adalora", "--max_steps=9", "--method=greedy"], "does not go with AdaLoRA"),
    ([*TRAIN, "--recompute=all", "--gradient_checkpointing"], "are both on: leave one of them out"),
    ([*TRAIN, "--bottleneck_dropout=-1", "--adapter=series"], "bottleneck_dropout=-1.0 is not allowed"),
    ([*TRAIN, "--max_train_seconds=0"], "max_train_seconds=0.0 is no time to train in"),
    ([*TRAIN, "--max_train_seconds=nan"], "max_train_seconds=nan is no time to train in"),
    # ---- data
    (DATA, "No dataset given: name one of --task word-problems, --data_files"),
    ([*TRAIN, "--data_files=rows.json"], "--task and --data_files given"),
    ([*DATA, "--task=riddles"], "task='riddles' is unknown"),
    ([*DATA, "--task", "word-problems", "boolq"], "word-problems trains alone"),
    ([*DATA, "--task=boolq"], "boolq does not come with this library"),
    ([*DATA, "--task=boolq", "--data_folder=nowhere"], "nowhere"),
    ([*DATA, "--task=boolq", "--data_folder=set"], "holds no train set of boolq"),
    ([*DATA, "--data_files=rows.json", "--test_tasks=riddles"], "task='riddles' is unknown"),
    ([*TRAIN, "--num_train_problems=0"], "num_train_problems=0 is not a whole number"),
    ([*TRAIN, "--num_test_problems=-1"], "num_test_problems=-1 is not a whole number"),
    ([*DATA, "--data_files=rows.json", "--validation_size=4"], "validation_size=4 leaves nothing of 4 rows"),
    ([*DATA, "--data_files=rows.json", "--validation_size=-1"], "validation_size=-1 is neither a count"),
    ([*DATA, "--data_files=rows.json", "--validation_size=1.0"], "validation_size=1.0 is neither a count"),
    ([*DATA, "--data_files=rows.json", "--validation_size=nan"], "validation_size=nan is neither a count"),
    ([*DATA, "--data_files=rows.json", "--validation_size=some"], "validation_size='some' is not a number"),
    ([*DATA, "--data_files"], "--data_files needs a value: give a text, or several with spaces between them."),
    ([*DATA, "--data_files=nothing.json"], "There is no file nothing.json (looked for /"),
    ([*DATA, "--data_files=*.nope"], "*.nope matches no file in /"),
    ([*DATA, "--data_files=row*.json"], "row*.json is a pattern, and files go by name: leave out its quotes"),
    ([*DATA, "--data_files=bad-config/model.bin"], "There is no file bad-config/model.bin"),
    ([*DATA, "--data_files=set"], "set is a folder: name the files in it (it holds train.jsonl)"),
    *(([*DATA, f"--data_files={name}"], name) for name in (
        "broken.json", "empty.json", "no-rows.json", "number.json", "texts.json", "fields.json", "nulls.json",
        "binary.json", "broken.jsonl", "fields.jsonl", "fields.csv", "empty.csv", "rows.xyz",
        "broken.gz.jsonl.gz", "cut.jsonl.gz", "broken.parquet", "roles.json", "no-answer.json",
    )),
    ([*DATA, "--dataset_name=rows.json"], "rows.json is a file: give --data_files"),
    ([*DATA, "--dataset_name=set"], "training needs 'text'"),
    ([*DATA, "--dataset_name=set", "--dataset_train_split=dev"], "The dataset has no split 'dev'"),
    # ---- models, adapters and runs
    (["train", "--task=word-problems"], "No model given"),
    *((["train", "--task=word-problems", "--use_cpu", "--bf16=false", f"--model_name_or_path={name}"], said)
      for name, said in (
        ("./none", "There is no model at ./none"), ("/no/model", "/no/model"), ("a/b/c", "a/b/c"),
        ("no-config", "no-config"), ("bad-config", "bad-config"), ("list-config", "list-config"),
        ("unknown-model", "mystery"), ("bad-adapter", "bad-adapter"), ("unknown-adapter", "MYSTERY"),
        ("no-type", "no-type"), ("rows.json", "rows.json"),
    )),
    ([*TRAIN, "--output_dir=rows.json"], "rows.json cannot be written"),
    ([*TRAIN, "--output_dir=rows.json/run"], "rows.json/run cannot be written"),
    ([*TRAIN, "--output_dir=finished"], "finished holds another run: give another --output_dir, or --overwrite."),
    ([*TRAIN, "--output_dir=stopped"], "resume it by --resume_from_checkpoint last"),
    ([*TRAIN, "--output_dir=new", "--resume_from_checkpoint=last"], "new holds no complete checkpoint"),
    ([*TRAIN, "--output_dir=stopped", "--resume_from_checkpoint=last"], "stopped holds no complete checkpoint"),
    ([*TRAIN, "--output_dir=new", "--resume_from_checkpoint=gone"], "There is no folder gone"),
    ([*TRAIN, "--output_dir=stopped", "--resume_from_checkpoint=stopped/checkpoint-3"], "checkpoint-3 is damaged"),
    # ---- recipes
    (["train", "--recipe"], "--recipe needs a name or a file"),
    (["train", "--recipe=nothing"], "There is no recipe 'nothing': give the path of a YAML file, or one of "),
    (["train", "--recipe=set"], "There is no recipe 'set'"),
    (["train", "--recipe=quick"], "'quick' (did you mean quickstart?), it is one of `ist compare`: give the path of a"),
    (["train", "--recipe=quikstart"], "There is no recipe 'quikstart' (did you mean quickstart?): give the path"),
    (["train", "--recipe=compare-table2"], "it is one of `ist compare`: "),
    (["train", "--recipe=rows.json"], "rows.json"),
    (["train", "--recipe=quickstart", "--trust_recipe=maybe"], "--trust_recipe takes no value"),
    *((["train", "--recipe", f"{name}.yaml"], said) for name, said in (
        ("broken", "broken.yaml is not YAML in line 2"), ("tabs", "tabs.yaml is not YAML"),
        ("list", "list.yaml holds no `key: value` lines"), ("text", "text.yaml holds no"),
        ("empty", "empty.yaml holds no"),
        ("binary", "binary.yaml is not YAML"), ("unknown", "did you mean 'learning_rate'?"),
        ("number-key", "number-key.yaml holds no"), ("nothing", "nothing.yaml sets learning_rate to nothing"),
        ("word", "word.yaml sets max_steps to 'many'"), ("half", "num_train_problems to 1.5"),
        ("choice", "choice.yaml sets save_strategy to 'often'"), ("method", "method='best' is unknown"),
        ("overwrite", "overwrite, which deletes another run"), ("code", "trust_remote_code, which runs code"),
        ("env", "changes the environment"), ("outside", "data_files to '/etc/passwd'"), ("parent", "'../rows.json'"),
        ("folder", "folder.yaml sets output_dir"), ("reporter", "reporter.yaml sets report_to"),
        ("self", "a value that contains itself"), ("deep", "nests too deep"),
        ("huge", "has a number of 5001 characters"),
        ("flag", "which looks like a flag"), ("both", "both"), ("wide", "a recipe has at most 100000"),
    )),
    # ---- ist eval
    (["eval"], "No model given"),
    (EVAL, "Nothing to evaluate on"),
    ([*EVAL, "--tasks=riddles"], "task='riddles' is unknown"),
    ([*EVAL, "--tasks=boolq"], "boolq"),
    ([*EVAL, "--tasks=boolq", "--data_folder=nowhere"], "nowhere"),
    ([*EVAL, "--tasks"], "--tasks needs a value: give a text, or several"),
    ([*EVAL, "--tasks=boolq", "--protocol=guess"], "--protocol guess is unknown: give one of generate, "),
    ([*EVAL, "--taskz=boolq"], "no flag --taskz (did you mean --tasks?): `ist eval --help` lists the flags."),
    ([*EVAL, "--from_hub=true"], "--from_hub takes no value"),
    (["eval", "--adapter=./none", "--tasks=boolq"], "There is no adapter at ./none (looked for /"),
    (["eval", "--adapter=set", "--tasks=boolq"], "set holds no adapter_config.json, and so no adapter: "),
    ([*EVAL, "--tasks=boolq", "--limit=none"], "--limit"),
    ([*EVAL, "--tasks=boolq", "--limit=0"], "limit"),
    ([*EVAL, "--tasks=boolq", "--batch_size=0"], "batch_size=0"),
    ([*EVAL, "--tasks=boolq", "--dtype=float8"], "float8"),
    ([*EVAL, "--text_files=rows.json"], "add --protocol loss"),
    ([*EVAL, "--lr=3"], "--lr"),
    ([*EVAL, "--tasks=word-problems", "--num_beams=0"], "num_beams=0 is not at least 1: write 1 for greedy answers."),
    ([*EVAL, "--tasks=word-problems", "--do_sample", "--top_p=2"], "top_p=2.0 is no probability above 0 and up to 1"),
    ([*EVAL, "--tasks=word-problems", "--do_sample", "--top_p=0"], "top_p=0.0 is no probability above 0 and up to 1"),
    ([*EVAL, "--tasks=word-problems", "--do_sample", "--top_k=-2"], "top_k=-2 is not at least 0"),
    ([*EVAL, "--tasks=word-problems", "--device=gpu"], "--device gpu cannot be used here (torch knows no such kind): "),
    ([*EVAL, "--tasks=word-problems", "--device=meta"], "--device meta cannot be used here (it holds no numbers)"),
    ([*EVAL, "--tasks=word-problems", "--device=cuda:99"], "--device cuda:99 cannot be used here ("),
    ([*EVAL, "--protocol=loss", "--data_files=nothing.json"], "nothing.json"),
    # ---- ist compare
    (["compare", "--recipe"], "--recipe needs a value"),
    (["compare", "--recipe=nothing"], "There is no comparison 'nothing'"),
    (["compare", "--recipe=quick", "--methods=none"], "methods='none' is unknown"),
    (["compare", "--recipe=quick", "--seeds=x"], "seeds"),
    (["compare", "--recipe=quick", "--budget=dollars"], "dollars"),
    (["compare", "quick"], "'quick' belongs to no flag: a recipe is given as `ist compare --recipe quick`, and `ist c"),
    (["compare", "--recipe=quick", "--output_dir=rows.json"], "The folder rows.json cannot be written (File exists)"),
    (["compare", "--recipe=quick", "--evaluation", "tasks=riddles"], "evaluation: task='riddles' is unknown"),
    (["compare", "--recipe=quick", "--evaluation", "tasks=boolq"], "evaluation: boolq does not come with this library"),
    (["compare", "--recipe=quick", "--evaluation", "data_files=gone.json"], "evaluation: There is no file gone.json"),
    (["compare", "--recipe=quick", "--lr=1"], "no flag --lr (did you mean --learning_rate?)"),
    *((["compare", "--recipe", f"{name}.yaml"], said) for name, said in (
        ("no-methods", "no-methods.yaml needs `methods:`"), ("methods-list", "methods-list.yaml needs `methods:`"),
        ("seeds", "seeds=[0, 0] is not a list of different whole numbers"), ("against", "against of a='b' is unknown"),
        ("own", "own.yaml sets seed, which ist compare gives"), ("rates", "learning_rates=[0]"),
        ("same", "have the same folder"), ("budget", "budget='dollars' is unknown"),
        ("unknown-flag", "did you mean 'learning_rate'?"), ("compare-code", "trust_remote_code, which runs code"),
        ("evaluation", "task_folder, which runs code"), ("eval-key", "did you mean 'tasks'?"),
        ("eval-list", "is no list of flags"), ("broken", "broken.yaml is not YAML"), ("list", "holds no `key: value`"),
    )),
    # ---- ist analyse and ist report
    (["analyse"], "ist analyse takes a folder, that of a finished run"),
    (["analyse", "nowhere"], "nowhere holds no finished run"),
    (["analyse", "set"], "set holds no finished run"),
    (["analyse", "finished"], "does not say how the run was made"),
    (["analyse", "broken-run"], "broken-run"),
    (["analyse", "list-run"], "does not say how the run was made"),
    (["analyse", "text-run"], "as a list of texts"),
    (["analyse", "code-run"], "sets trust_remote_code, which runs code"),
    (["report"], "ist report takes the folder of a run"),
    (["report", "a", "b"], "does not exist: give the folder of a run"),
    (["report", "nowhere"], "nowhere"),
    (["report", "--help-all"], "ist report has no flag --help-all: give the folder of a run, or several"),
    (["report", "set", "--dpi=3"], "ist report has no flag --dpi=3"),
    (["recipes", "quick"], "ist recipes takes no 'quick': give it alone."),
    (["report", "set"], "set"),
    (["report", "empty-history"], "empty-history"),
    (["report", "list-history"], "list-history"),
]
# fmt: on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all the files; no command may change it, so all share it."""
    folder = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def snapshot(folder: Path) -> dict[str, Any]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_there_are_many() -> None:
    assert len({" ".join(arguments) for arguments, _ in CASES}) == len(CASES) >= 150


@pytest.mark.filterwarnings("ignore:Damaged checkpoints")
@pytest.mark.parametrize(("arguments", "said"), CASES, ids=[" ".join(arguments) for arguments, _ in CASES])
def test_a_bad_input_is_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ist {arguments[0]}: error: ")
    assert error.count("\n") == 1
    assert said in error
    assert snapshot(folder) == before
