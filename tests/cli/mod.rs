//! The command line as a user meets it: help, wrong input, pipes, exit codes.

mod adapter;
mod chat;
mod hub;
mod profile;
mod rows;

use std::{
    io::{Read, Write},
    path::Path,
    process::{Output, Stdio},
};

use serde_json::Value;
use warpo::{
    device::Device,
    models::{self, Head, Model, ParamKind},
};

use crate::support::{
    golden, host,
    runs::{small, warpo},
    temp_dir,
};

fn model() -> String {
    golden::path("../../examples/quickstart/model").display().to_string()
}

fn run(args: &[&str]) -> Output {
    warpo(args).output().unwrap()
}

/// Runs with text on standard input.
fn feed(args: &[&str], input: &(impl AsRef<[u8]> + ?Sized)) -> Output {
    let mut child = warpo(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that refuses its arguments never reads.
    let _ = child.stdin.take().unwrap().write_all(input.as_ref());
    child.wait_with_output().unwrap()
}

/// What a failed command says, and its code; it never panics.
#[track_caller]
fn refused(out: &Output) -> (i32, String) {
    let text = String::from_utf8(out.stderr.clone()).unwrap();
    assert!(!text.contains("panicked"), "{text}");
    (out.status.code().unwrap(), text)
}

#[track_caller]
fn lines(out: &Output) -> Vec<Value> {
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout.clone()).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn floats(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

#[test]
fn help_names_every_command_and_the_exit_codes() {
    let out = run(&["--help"]);
    let text = String::from_utf8(out.stdout).unwrap();
    let all = [
        "train",
        "plan",
        "generate",
        "score",
        "tokenize",
        "chat",
        "config",
        "quickstart",
        "report",
        "doctor",
    ];
    for word in all {
        // in the list of commands, not in an example
        assert!(text.lines().any(|l| l.starts_with(&format!("  {word} "))), "{word}: {text}");
    }
    assert!(text.contains("Exit codes"), "{text}");
    assert_eq!(refused(&run(&[])).0, 2);
    assert_eq!(refused(&run(&["dance"])).0, 2);
}

#[test]
fn a_wrong_setting_is_named_with_the_nearest_known_one() {
    let dir = temp_dir("cli_settings");
    let file = dir.join("run.toml");
    for (text, code, words) in [
        (
            "learning_rte = 1e-3",
            2,
            ["`learning_rte`", "run.toml:1", "did you mean `learning_rate`?"],
        ),
        ("steps = 3\nbatch_size = \"many\"", 2, ["`batch_size`", "run.toml:2", "a whole number"]),
        ("steps = ", 2, ["run.toml", "not TOML", "line 1"]),
        ("lr = 1e-3", 2, ["`lr`", "run.toml:1", "did you mean `learning_rate`?"]),
        ("num_train_epochs = 3", 2, ["no such key", "run.toml:1", "did you mean `epochs`?"]),
        ("kl_coef = 0.1", 2, ["`kl_coef`", "run.toml:1", "is a setting of ppo, not of sft"]),
        ("[sft]\nsteps = 3", 2, ["`sft`", "no such key", "leave out `[sft]`"]),
        ("\nbatch_size = 0", 2, ["got 0, wanted from 1 to", "`batch_size`", "run.toml:2"]),
        ("schedule = \"cosin\"", 2, ["`schedule`", "\"cosin\"", "\"cosine\""]),
        (
            "learning_rate = -1.0\nmodel = \"m\"\ndata = \"d\"",
            2,
            ["`learning_rate`", "wanted", "0 or more"],
        ),
        ("model = \"nowhere\"\ndata = \"d\"", 1, ["nowhere", "cannot read", "No such file"]),
    ] {
        std::fs::write(&file, text).unwrap();
        let out = dir.join("out").display().to_string();
        let out = run(&["train", "sft", "--config", file.to_str().unwrap(), "--out", &out]);
        let (got, message) = refused(&out);
        assert_eq!(got, code, "{text}: {message}");
        for word in words {
            assert!(message.contains(word), "{text}: no {word} in {message}");
        }
    }
    let (code, text) = refused(&run(&["train", "sft", "--set", "steps"]));
    assert_eq!((code, text.contains("wanted key=value")), (2, true), "{text}");
    let (code, text) = refused(&run(&["train", "sft", "--config", "/dev/zero"]));
    assert_eq!(
        (code, text.contains("/dev/zero: is longer than 1048576 bytes")),
        (2, true),
        "{text}"
    );
    let (code, text) = refused(&run(&["train", "sft", "--config", "no/such.toml"]));
    assert_eq!((code, text.contains("cannot read no/such.toml")), (2, true), "{text}");
    let missing =
        ["train", "sft", "--model", &model(), "--data", "none.jsonl", "--set", "out=/dev/null/x"];
    assert_ne!(refused(&run(&missing)).0, 0);
}

#[test]
fn a_missing_device_has_an_exit_code_of_its_own() {
    let (code, text) =
        refused(&run(&["generate", "--model", &model(), "--device", "cuda", "--data", "x"]));
    assert_eq!(code, 3, "{text}");
    let (code, text) =
        refused(&run(&["generate", "--model", &model(), "--device", "tpu", "--data", "x"]));
    assert_eq!((code, text.contains("known devices are auto, cpu")), (3, true), "{text}");
}

#[test]
fn a_bad_line_of_data_is_named() {
    let args = ["generate", "--model", &model(), "--data", "-"];
    for (input, words) in [
        ("{\"prompt\": \"a\"}\n{\"prompt\": 3}\n", ["<stdin>:2", "`prompt` is 3, wanted a text"]),
        ("{\"prompt\": \"a\"}\nhello\n", ["<stdin>:2", "not JSON"]),
        ("{\"input_ids\": [1, 512]}\n", ["<stdin>:1", "token id 512, wanted less than 512"]),
        ("\n\n", ["<stdin>", "has no records"]),
    ] {
        let (code, text) = refused(&feed(&args, input));
        assert_eq!(code, 1);
        assert!(words.iter().all(|w| text.contains(w)), "{input}: {text}");
    }
}

/// `generate` and `score` agree: the same tokens, the same log-probs.
#[test]
fn generate_and_score_write_the_same_numbers() {
    let m = model();
    let prompts = "{\"prompt\": \"Once upon\"}\n{\"prompt\": \"Lily and Tom\"}\n";
    let args = ["generate", "--model", &m, "--samples", "2", "--max-new-tokens", "9"];
    let out =
        lines(&feed(&[&args[..], &["--temperature", "0.7", "--top-k", "9"]].concat(), prompts));
    assert_eq!(out.len(), 4);
    assert_ne!(out[0]["output_ids"], out[1]["output_ids"], "two samples of one prompt");
    for line in &out {
        let ids = |key: &str| line[key].as_array().unwrap().clone();
        let all = [ids("input_ids"), ids("output_ids")].concat();
        let input = format!("{}\n", serde_json::json!({ "input_ids": all }));
        let scored = lines(&feed(&["score", "--model", &m, "--temperature", "0.7"], &input));
        let (ours, theirs) = (floats(&line["logprobs"]), floats(&scored[0]["logprobs"]));
        assert_eq!(theirs.len(), all.len() - 1);
        assert_eq!(ours, theirs[theirs.len() - ours.len()..]);
        let sum: f64 = theirs.iter().sum();
        assert_eq!(scored[0]["sum_logprob"].as_f64().unwrap(), sum);
        let perplexity = scored[0]["perplexity"].as_f64().unwrap();
        assert!((perplexity - (-sum / theirs.len() as f64).exp()).abs() < 1e-9 * perplexity);
    }
    let (code, text) = refused(&feed(&[&args[..], &["--top-p", "1.5"]].concat(), prompts));
    assert_eq!((code, text.contains("`--top-p`: got 1.5, wanted in (0, 1]")), (2, true), "{text}");
}

/// One line of scores for each line of data, of what the prompt does not hold.
#[test]
fn every_format_is_scored() {
    let m = model();
    let score = |input: &str, more: &[&str]| {
        lines(&feed(&[&["score", "--model", &m], more].concat(), input))
    };
    let text = &score("{\"text\": \"Once upon a time\"}\n", &[])[0];
    let (ids, all) = (text["input_ids"].as_array().unwrap(), floats(&text["logprobs"]));
    assert_eq!(all.len(), ids.len() - 1);
    let pair = &score("{\"prompt\": \"Once upon\", \"completion\": \" a time\"}\n", &[])[0];
    assert_eq!(pair["input_ids"], text["input_ids"]);
    let part = floats(&pair["logprobs"]);
    assert!(part.len() < all.len());
    assert_eq!(part, all[all.len() - part.len()..]);
    let input = "{\"prompt\": \"Once upon\", \"chosen\": \" a time\", \"rejected\": \" a cat\"}\n";
    let both = &score(input, &[])[0];
    assert_eq!(both["chosen"], *pair);
    assert_ne!(both["rejected"]["sum_logprob"], both["chosen"]["sum_logprob"]);
    // what `generate` writes, `score` reads
    let made =
        feed(&["generate", "--model", &m, "--max-new-tokens", "5"], "{\"prompt\": \"Once\"}\n");
    let again = &score(std::str::from_utf8(&made.stdout).unwrap(), &[])[0];
    assert_eq!(again["logprobs"], lines(&made)[0]["logprobs"]);
    // the end of the text is appended to texts, and has a log-prob of its own
    let ended = &score("{\"text\": \"Once upon a time\"}\n", &["--eos"])[0];
    assert_eq!(floats(&ended["logprobs"])[..all.len()], all);
    assert_eq!(floats(&ended["logprobs"]).len(), all.len() + 1);
    // a text that is too long loses its end, and keeps its beginning
    let long = format!("{{\"text\": \"{}\"}}\n", "Once upon a time ".repeat(400));
    let long = &score(&long, &["--eos"])[0];
    let ids = long["input_ids"].as_array().unwrap();
    assert_eq!((ids.len(), &ids[0]), (512, &text["input_ids"][0]));
    for (command, what) in [("score", "wanted at least one"), ("generate", "no tokens to continue")]
    {
        let input = "{\"input_ids\": [5]}\n{\"input_ids\": []}\n";
        let (code, text) = refused(&feed(&[command, "--model", &m], input));
        assert!(code == 1 && text.contains("<stdin>:2: ") && text.contains(what), "{text}");
    }
}

/// Rows come in parts, as they are done; what a text is scored with does not depend on its part.
#[test]
fn a_row_does_not_see_its_part() {
    let text = |i: usize| {
        let ids: Vec<usize> = (0..100 + i % 7).map(|k| 3 + (i * 31 + k * 17) % 100).collect();
        serde_json::json!({ "input_ids": ids }).to_string() + "\n"
    };
    let (m, rm) = (golden::path("llama_tied"), golden::path("llama_tied/rm"));
    let args = ["score", "--model", m.to_str().unwrap(), "--reward-model", rm.to_str().unwrap()];
    let texts: Vec<String> = (0..90).map(text).collect();
    let all = lines(&feed(&args, &texts.concat()));
    assert_eq!(all.len(), texts.len());
    for i in [0, 40, 81, 82, 89] {
        assert_eq!(lines(&feed(&args, &texts[i])), all[i..=i], "{i}");
    }
    let ids =
        |i: usize| texts[i].replace("input_ids", "chosen_ids").replace('}', "").trim().to_owned();
    let pair = |i: usize| format!("{}, \"rejected_ids\": [5], \"prompt_ids\": [7, 8]}}\n", ids(i));
    let pairs = lines(&feed(&args, &(0..90).map(pair).collect::<String>()));
    assert_eq!(pairs.len(), 90);
    assert_eq!(lines(&feed(&args, &pair(85))), pairs[85..86]);
}

/// A hostile file's control characters reach no terminal, and megabytes of it no log.
#[test]
fn messages_are_plain_and_short() {
    let dir = temp_dir("cli_plain");
    for (kind, want) in [
        (
            "\u{1b}]0;x\u{7}\u{1b}[2J".to_owned(),
            "`model_type` is \\u{1b}]0;x\\u{7}\\u{1b}[2J, wanted",
        ),
        ("x".repeat(1 << 19), "xxx [...] xxx"),
    ] {
        let config = serde_json::json!({ "model_type": kind }).to_string();
        std::fs::write(dir.join("config.json"), config).unwrap();
        let (code, text) = refused(&run(&["score", "--model", dir.to_str().unwrap()]));
        assert!(code == 1 && text.contains(want) && text.len() < 2000, "{text}");
        assert!(!text.contains('\u{1b}'), "{text:?}");
    }
}

/// Keys of other projects are answered with ours.
#[test]
fn names_elsewhere_are_answered() {
    for (key, want) in [
        ("rollout.n", "samples_per_prompt"),
        ("actor_rollout_ref.rollout.n", "samples_per_prompt"),
        ("critic.optim.lr", "value_learning_rate"),
        ("actor_rollout_ref.actor.optim.lr", "learning_rate"),
        ("gradient-checkpointing", "recompute"),
        ("cutoff_len", "max_length"),
    ] {
        let (code, text) = refused(&run(&["train", "ppo", "--set", &format!("{key}=1")]));
        assert!(code == 2 && text.contains(&format!("did you mean `{want}`?")), "{key}: {text}");
    }
}

#[test]
fn every_setting_is_a_flag() {
    let out = temp_dir("cli_flags");
    let (model, to) = (golden::path("llama_tied"), out.to_str().unwrap());
    let args = ["train", "sft", "--model", model.to_str().unwrap(), "--data", "-", "--out", to];
    let flags = [
        "--batch-size",
        "1",
        "--decay_all",
        "--stop-ids",
        "3",
        "--stop-ids=4",
        "--schedule=cosine",
        "--warmup-ratio",
        "1",
    ];
    let done = feed(&[&args[..], &flags[..]].concat(), "{\"input_ids\": [5, 6, 7]}\n");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(said.contains("warning: the warmup has 1 steps, the run has 1 steps"), "{said}");
    let config = std::fs::read_to_string(out.join("config.toml")).unwrap();
    for line in [
        "batch_size = 1",
        "decay_all = true",
        "stop_ids = [3, 4]",
        "schedule = \"cosine\"",
        "warmup_ratio = 1.0",
    ] {
        assert!(config.lines().any(|l| l == line), "{line}");
    }
    for (flags, says) in [
        (&["--learning-rate", "-1"][..], "`learning_rate`: got -1, wanted 0 or more"),
        (&["--learning-rate", "--steps", "3"], "`learning_rate`: wanted key=value"),
        (&["--learning_rate"], "`learning_rate`: wanted key=value"),
        (&["--steps", "3", "--steps", "4"], "`steps`: got [3, 4], wanted a whole number"),
        (&["--stop-ids", "3", "--stop-ids=x"], "`stop_ids`: got [3, \"x\"], wanted a list"),
        (&["--decay-all", "sft"], "unexpected argument 'sft'"),
        (&["--lerning-rate=1"], "did you mean `learning_rate`?"),
        (&["--num-train-epochs", "3"], "did you mean `epochs`?"),
        (&["--value-clip", "1"], "is a setting of ppo, not of sft"),
        (&["--", "--steps"], "unexpected argument"),
        (&["--model"], "a value is required for '--model <DIR>'"),
    ] {
        for command in ["train", "plan"] {
            let (code, text) = refused(&run(&[&[command, "sft"], flags].concat()));
            assert!(code == 2 && text.contains(says), "{command} {flags:?}: {text}");
        }
    }
    let (code, text) = refused(&run(&["generate", "--learning-rate", "1"]));
    assert!(code == 2 && text.contains("unexpected argument '--learning-rate'"), "{text}");
}

#[test]
fn a_reward_model_adds_rewards() {
    let (m, rm) = (golden::path("llama_tied"), golden::path("llama_tied/rm"));
    let (m, rm) = (m.to_str().unwrap(), rm.to_str().unwrap());
    let input = "{\"input_ids\": [5, 6, 7]}\n";
    let args = ["--reward-model", rm];
    let out = lines(&feed(
        &[&["generate", "--model", m, "--max-new-tokens", "4"], &args[..]].concat(),
        input,
    ));
    let ids = |key: &str| out[0][key].as_array().unwrap().clone();
    let all = [ids("input_ids"), ids("output_ids")].concat();
    let all = serde_json::json!({ "input_ids": all });
    let scored = lines(&feed(&[&["score"], &args[..]].concat(), &format!("{all}\n")));
    assert_eq!(out[0]["reward"], scored[0]["reward"]);
    assert!(scored[0].get("logprobs").is_none(), "no language model was asked for");
}

/// `warpo generate | head -1` ends quietly when the reader goes away.
#[test]
fn a_reader_that_goes_away_is_no_error() {
    let prompts = "{\"prompt\": \"Once\"}\n".repeat(400);
    let mut child = warpo(&["score", "--model", &model()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(prompts.as_bytes()).unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 10]).unwrap();
    drop(out);
    let done = child.wait_with_output().unwrap();
    let text = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success() && !text.contains("error"), "{text}");
}

/// Data from standard input trains, and the run explains itself.
#[test]
fn training_reads_standard_input_and_leaves_a_whole_folder() {
    let dir = temp_dir("cli_stdin");
    let out = dir.join("run");
    let data = std::fs::read_to_string(crate::support::runs::data(&dir, "sft", 20)).unwrap();
    let model = golden::path("llama_tied");
    let args = ["train", "sft", "--model", model.to_str().unwrap(), "--data", "-", "--out"];
    let sets = ["--set", "steps=3", "--set", "batch_size=4", "--set", "eos_id=54"];
    let done = feed(&[&args[..], &[out.to_str().unwrap()], &sets[..]].concat(), &data);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(String::from_utf8(done.stdout).unwrap().trim(), out.join("final").to_str().unwrap());
    for file in ["run.json", "config.toml", "metrics.jsonl", "timing.jsonl", "final/config.json"] {
        assert!(out.join(file).exists(), "{file}");
    }
    let text = String::from_utf8(done.stderr).unwrap();
    for words in [
        "algorithm: sft",
        "4 texts a step",
        "sft 3/3: ",
        "tokens/s, loss",
        "100 %, 0:00:0",
        "0:00:00 left",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let page = run(&["report", out.to_str().unwrap()]);
    assert!(page.status.success() && out.join("report.html").exists());
}

/// A disk that fills up stops the run with its name, and frees no checkpoint.
#[test]
fn a_full_disk_is_named() {
    if !Path::new("/dev/full").exists() {
        return;
    }
    let dir = temp_dir("cli_full");
    let run = dir.join("run");
    std::fs::create_dir_all(run.join("rollouts")).unwrap();
    std::os::unix::fs::symlink("/dev/full", run.join("rollouts/step-3.jsonl.tmp")).unwrap();
    let mut args = vec!["train".to_owned(), "ppo".to_owned()];
    for pair in small(&dir, "ppo", &run).into_iter().chain(["checkpoint_every=1".into()]) {
        args.extend(["--set".into(), pair]);
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (code, text) = refused(&warpo(&args).output().unwrap());
    assert_eq!(code, 1);
    assert!(text.contains("step-3.jsonl") && text.contains("No space left"), "{text}");
    assert!(run.join("checkpoints/step-2").is_dir());
    // What is no file is not read: it may have no end.
    std::fs::remove_file(run.join("timing.jsonl")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", run.join("timing.jsonl")).unwrap();
    let (code, text) = refused(&warpo(&args).output().unwrap());
    assert!(code == 1 && text.contains("timing.jsonl: it is no regular file"), "{text}");
}

#[test]
fn doctor_says_what_is_there() {
    let text = String::from_utf8(run(&["doctor"]).stdout).unwrap();
    for word in ["warpo 0.", "device: cpu, ", "instruction sets: portable", "cuda: "] {
        assert!(text.contains(word), "{word}: {text}");
    }
}

/// A plan for GPUs that are not there, of a model of which there is only the config.
#[test]
fn plan_says_what_fits() {
    let dir = temp_dir("cli_plan");
    let config = r#"{"model_type": "llama", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24,
        "num_attention_heads": 14, "head_dim": 64, "num_key_value_heads": 2, "intermediate_size": 4864,
        "max_position_embeddings": 4096, "tie_word_embeddings": true}"#;
    std::fs::write(dir.join("config.json"), config).unwrap();
    let model = dir.display().to_string();
    let plan = |more: &[&str]| {
        let judge = format!("reward_model={model}");
        let args = [&["plan", "ppo", "--model", &model, "--set", &judge], more].concat();
        let done = warpo(&args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (done.status.code(), text(done.stdout), text(done.stderr))
    };
    let number = |text: &str, row: &str| -> f64 {
        let line =
            text.lines().find(|l| l.starts_with(row)).unwrap_or_else(|| panic!("{row}: {text}"));
        line.split_whitespace().rev().nth(2).unwrap().parse().unwrap()
    };
    let (code, text, _) = plan(&["--gpu", "h100"]);
    assert_eq!(code, Some(0));
    assert!(text.contains("NVIDIA H100 SXM, 80 GB"), "{text}");
    let (fixed, shared) = (number(&text, "for the whole run"), number(&text, "all phases share"));
    assert_eq!(number(&text, "total"), fixed + shared);
    // bf16 weights of four models; f32 weights, gradients and two moments of two; a gradient of
    // tokens beside that of the tied LM head
    let (weights, tokens) = (494e6, 4.0 * 151_936.0 * 896.0);
    let want = weights * (4.0 * 2.0 + 2.0 * 16.0) + tokens;
    assert!((fixed / want - 1.0).abs() < 0.02, "{fixed}");

    // What it says to fit fits, and one token more does not.
    let (_, text, _) = plan(&["--gpu", "h100", "--set", "batch_size=4096"]);
    let most = text.split("of up to ").last().unwrap().split(':').next().unwrap().to_owned();
    let more = (most.parse::<usize>().unwrap() + 1).to_string();
    let at = |rows: &str| {
        let rows = format!("micro_batch_tokens={rows}");
        number(&plan(&["--gpu", "h100", "--set", &rows, "--set", "batch_size=4096"]).1, "total")
    };
    let memory = f64::from(81_559 - 1024) * f64::from(1 << 20);
    assert!(at(&most) <= memory && at(&more) > memory, "{most}");

    // Less is needed where blocks are computed again and frozen models wait on the host.
    let less = ["--gpu", "h100", "--set", "recompute=true", "--set", "offload_frozen=true"];
    let (_, saved, _) = plan(&less);
    assert!(number(&saved, "for the whole run") < fixed - 1.9 * weights, "{saved}");
    assert!(number(&saved, "train the policy") < number(&text, "train the policy"), "{saved}");
    let (_, text, _) = plan(&["--gpu", "rtx4090", "--memory", "20GiB"]);
    assert!(text.contains("In 20.00 GiB fit micro_batch_tokens of up to "), "{text}");
    let (code, text, error) = plan(&["--gpu", "rtx4090", "--memory", "8GB"]);
    assert!(text.contains("It does not fit 7.45 GiB: micro-batches of "), "{text}");
    assert!(code == Some(1) && error.contains("the run needs "), "{error}");
    let (code, _, text) = plan(&["--gpu", "h100", "--set", "reward_model=nowhere"]);
    assert!(code == Some(1) && text.contains("nowhere/config.json"), "{text}");
    std::fs::write(dir.join("config.json"), config.replace("896", "900")).unwrap();
    let (code, _, text) = plan(&["--gpu", "h100"]);
    let want = "hidden size on a CUDA device: got 900, wanted a multiple of 8";
    assert!(code == Some(1) && text.contains(want), "{text}");
    std::fs::write(dir.join("config.json"), config.replace(": 14,", ": 130,")).unwrap();
    let (code, _, text) = plan(&["--gpu", "h100"]);
    let want = "query heads of a KV head on a CUDA device: got 65, wanted at most 64";
    assert!(code == Some(1) && text.contains(want), "{text}");
    std::fs::write(dir.join("config.json"), config).unwrap();
    for (more, says) in [
        (&["--gpu", "h9000"][..], "`--gpu`: got h9000, wanted one of h200, h100"),
        (&["--gpu", "h100", "--memory", "much"], "`--memory`: got much, wanted a size as 141GB"),
    ] {
        let (code, _, text) = plan(more);
        assert!(code == Some(2) && text.contains(says), "{text}");
    }
}

/// Property 9 where no step is: finite weights whose products overflow. A fixed fault: NaN was
/// printed, with exit code 0.
#[test]
fn a_bad_number_of_a_model_is_an_error() {
    let (dir, dev) = (temp_dir("cli_not_finite"), Device::cpu());
    for (from, head, to) in [("llama_tied", Head::Lm, "lm"), ("llama_tied/rm", Head::Scalar, "rm")]
    {
        let mut model = Model::<f32>::load(&dev, &golden::path(from), head, None).unwrap();
        let last = model.params_mut().unwrap().get_mut(ParamKind::FinalNorm, None).unwrap().host();
        last.fill(1e38);
        if head == Head::Scalar {
            model.params_mut().unwrap().get_mut(ParamKind::Score, None).unwrap().host().fill(1e38);
        }
        std::fs::create_dir_all(dir.join(to)).unwrap();
        models::save(host(), &model, &dir.join(to)).unwrap();
    }
    let (lm, rm) = (dir.join("lm").display().to_string(), dir.join("rm").display().to_string());
    let good = golden::path("llama_tied").display().to_string();
    let input = "{\"input_ids\": [5, 6, 7]}\n";
    for (args, what) in [
        (&["score", "--model", &lm][..], "<stdin>:1: the log-prob of scored token 0 is "),
        (&["score", "--reward-model", &rm], "<stdin>:1: the reward is "),
        (&["generate", "--model", &lm], "the log-prob of token 0 of sample 0 is "),
        (&["generate", "--model", &good, "--reward-model", &rm], "the reward of sample 0 is "),
    ] {
        let (code, text) = refused(&feed(args, input));
        assert!(code == 4 && text.contains(what), "{args:?}: {code} {text}");
    }
}

/// A preset wins over defaults, a file over the preset, the command line over both; what is printed
/// is complete, and a run records the values.
#[test]
fn a_preset_gives_way_to_what_is_set() {
    let text = String::from_utf8(run(&["config", "grpo", "--preset", "dapo"]).stdout).unwrap();
    for line in ["\nclip_range_high = 0.28\n", "\noverlong_share = 0.2\n", "\nkl_coef = 0.0\n"] {
        assert!(text.contains(line), "{line}: {text}");
    }
    assert!(
        text.contains("\n# --preset dapo, which is this: DAPO")
            && text.contains("\n# --preset trl: ")
    );
    let dir = temp_dir("cli_preset");
    let (out, file) = (dir.join("run"), dir.join("grpo.toml"));
    std::fs::write(&file, "clip_range = 0.3\nkl_coef = 0.01\noverlong_share = 0.3\n").unwrap();
    let mut args = ["train", "grpo", "--preset", "dapo", "--config"].map(String::from).to_vec();
    args.push(file.display().to_string());
    for pair in small(&dir, "grpo", &out).into_iter().chain(["overlong_share=0.5".into()]) {
        args.extend(["--set".into(), pair]);
    }
    args.extend(["--set".into(), "steps=1".into()]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = run(&args);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let text = std::fs::read_to_string(out.join("config.toml")).unwrap();
    for line in
        ["clip_range = 0.3", "clip_range_high = 0.28", "overlong_share = 0.5", "kl_coef = 0.05"]
    {
        assert!(text.lines().any(|l| l == line), "{line}: {text}");
    }
    let (code, text) = refused(&run(&["train", "grpo", "--preset", "dapp"]));
    assert!(code == 2 && text.contains("grpo has no `dapp`") && text.contains("dapo"), "{text}");
}
