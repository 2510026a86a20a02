//! The rows of `generate` and `score`: in a file, gone on with, summed up, ended by a text.

use serde_json::Value;

use super::{feed, floats, lines, model, refused, run};
use crate::support::{golden, temp_dir};

const PROMPTS: &str = "{\"prompt\": \"Once upon\"}\n{\"prompt\": \"Lily and Tom\"}\n";

/// A file that was cut off anywhere ends with the bytes of the straight run, and is told from one
/// of other settings.
#[test]
fn a_file_of_rows_is_gone_on_with() {
    let (dir, m) = (temp_dir("cli_rows"), model());
    let path = dir.join("rows.jsonl");
    let path = path.to_str().unwrap();
    let generate = |more: &[&str]| {
        let args = ["generate", "--model", &m, "--samples", "3", "--max-new-tokens", "5"];
        feed(&[&args[..], &["--out", path], more].concat(), PROMPTS)
    };
    let done = generate(&[]);
    assert!(done.status.success() && done.stdout.is_empty());
    let whole = std::fs::read(path).unwrap();
    let ends: Vec<usize> = (0..whole.len()).filter(|i| whole[*i] == b'\n').map(|i| i + 1).collect();
    assert_eq!(ends.len(), 6);
    for cut in [0, 10, ends[0], ends[2], ends[2] + 7, ends[5] - 1, ends[5]] {
        std::fs::write(path, &whole[..cut]).unwrap();
        let done = generate(&["--resume"]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert!(std::fs::read(path).unwrap() == whole, "cut at {cut}");
    }
    std::fs::write(path, &whole[..ends[3]]).unwrap();
    let (code, e) = refused(&generate(&["--resume", "--seed", "1"]));
    assert!(code == 1 && e.contains("rows.jsonl: row 4 is another than this command makes"), "{e}");
    assert!(std::fs::read(path).unwrap() == whole[..ends[3]], "nothing was added");
    for (text, says) in [
        ("[1, 2]", "row 1 is another"),
        ("{}\n{}", "row 1 is another"),
        (&"{}\n".repeat(9), "has 9 rows, more than this command makes"),
    ] {
        std::fs::write(path, text).unwrap();
        let (code, e) = refused(&generate(&["--resume"]));
        assert!(code == 1 && e.contains(says), "{e}");
        assert_eq!(std::fs::read_to_string(path).unwrap(), text, "it is not this command's");
    }
    let (code, e) = refused(&generate(&[]));
    assert!(code == 2 && e.contains("`--out`"), "{e}");
    let (code, e) = refused(&feed(&["generate", "--model", &m, "--resume"], PROMPTS));
    assert!(code == 2 && e.contains("--out <FILE>"), "{e}");
}

/// The summary is that of the rows, whether they were written at once or not.
#[test]
fn scores_are_summed_up() {
    let (dir, m) = (temp_dir("cli_summary"), model());
    let path = dir.join("rows.jsonl");
    let mut input = String::new();
    for (chosen, rejected) in [(" a time", " a cat"), (" xq", " a time"), (" a dog", " a dog")] {
        let row =
            serde_json::json!({ "prompt": "Once upon", "chosen": chosen, "rejected": rejected });
        input += &format!("{row}\n");
    }
    let args = ["score", "--model", &m, "--summary", "--out", path.to_str().unwrap()];
    let first = lines(&feed(&args, &input));
    let text = std::fs::read_to_string(&path).unwrap();
    let rows: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let of = |row: &Value, side: &str| {
        (row[side]["sum_logprob"].as_f64().unwrap(), floats(&row[side]["logprobs"]).len() as f64)
    };
    let (mut sum, mut n, mut margin) = (0.0, 0.0, 0.0);
    for row in &rows {
        let (chosen, rejected) = (of(row, "chosen"), of(row, "rejected"));
        (sum, n) = (sum + chosen.0 + rejected.0, n + chosen.1 + rejected.1);
        margin += (chosen.0 - rejected.0) / 3.0;
    }
    let get = |key: &str| first[0][key].as_f64().unwrap();
    assert_eq!((get("rows"), get("tokens"), get("logprob_accuracy")), (3.0, n, 0.5));
    assert!((get("perplexity") / (-sum / n).exp() - 1.0).abs() < 1e-12);
    assert!((get("logprob_margin") / margin - 1.0).abs() < 1e-12);
    assert!(first[0].get("reward_mean").is_none(), "no reward model was asked for");
    // from the second row on, and to standard error
    let end = text.find('\n').unwrap() + 1;
    std::fs::write(&path, &text[..end + 9]).unwrap();
    assert_eq!(lines(&feed(&[&args[..], &["--resume"]].concat(), &input)), first);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    let out = feed(&["score", "--model", &m, "--summary"], &input);
    assert_eq!(lines(&out), rows);
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(serde_json::from_str::<Value>(said.trim()).unwrap(), first[0]);
}

/// A sample ends before the text, and its tokens with that which completes it.
#[test]
fn a_text_ends_a_sample() {
    let m = model();
    let args = ["generate", "--model", &m, "--temperature", "0", "--max-new-tokens"];
    let most = |n: usize, more: &[&str]| {
        let n = n.to_string();
        lines(&feed(&[&args[..], &[&n], more].concat(), PROMPTS))
    };
    let generate = |more: &[&str]| most(40, more);
    let whole = generate(&[]);
    let text = |row: &Value| row["text"].as_str().unwrap().to_owned();
    let stop: String = text(&whole[0]).chars().skip(9).take(4).collect();
    let cut = generate(&["--stop", "nowhere", "--stop", &stop]);
    let at = text(&whole[0]).find(&stop).unwrap();
    assert_eq!(text(&cut[0]), text(&whole[0])[..at]);
    assert_eq!(cut[0]["stopped"], true);
    let n = floats(&cut[0]["logprobs"]).len();
    assert!(n < 40 && cut[0]["output_ids"].as_array().unwrap().len() == n);
    assert_eq!(floats(&cut[0]["logprobs"]), floats(&whole[0]["logprobs"])[..n]);
    // of two texts that overlap the one that is complete first counts, as a reader sees them come
    let inner: String = stop.chars().take(1).collect();
    let both = generate(&["--stop", &stop, "--stop", &inner]);
    let one = generate(&["--stop", &inner]);
    assert_eq!(
        (&both[0]["text"], &both[0]["output_ids"]),
        (&one[0]["text"], &one[0]["output_ids"])
    );
    // one token fewer does not hold it
    let ids = &whole[0]["output_ids"].as_array().unwrap()[..n];
    assert_eq!(cut[0]["output_ids"].as_array().unwrap(), ids);
    for (n, holds) in [(n, true), (n - 1, false)] {
        assert_eq!(text(&most(n, &[])[0]).contains(&stop), holds);
    }
    let (code, e) = refused(&feed(&[&args[..], &["5", "--stop", ""]].concat(), PROMPTS));
    assert!(code == 2 && e.contains("`--stop`: got an empty one, wanted a text"), "{e}");
    let ids = golden::path("llama_tied").display().to_string();
    let args = ["generate", "--model", &ids, "--stop", "x"];
    let (code, e) = refused(&feed(&args, "{\"input_ids\": [5]}\n"));
    assert!(code == 2 && e.contains("wanted a tokenizer in"), "{e}");
}

/// The best of a prompt's samples are data for fine-tuning, the best and the worst for DPO.
#[test]
fn the_best_samples_are_data_to_learn_from() {
    let dir = temp_dir("cli_best_of");
    let (m, rm) = (golden::path("llama_tied"), golden::path("llama_tied/rm"));
    let (m, rm) = (m.to_str().unwrap(), rm.to_str().unwrap());
    let prompts = "{\"input_ids\": [5, 6, 7]}\n{\"input_ids\": [8]}\n{\"input_ids\": [9, 4]}\n";
    let args = ["generate", "--model", m, "--reward-model", rm, "--samples", "4", "--slots", "1"];
    let args = [&args[..], &["--max-new-tokens", "5", "--keep"]].concat();
    let keep = |what: &str, more: &[&str]| feed(&[&args[..], &[what], more].concat(), prompts);
    let (all, best, pairs) =
        (lines(&keep("all", &[])), lines(&keep("best", &[])), lines(&keep("pair", &[])));
    assert_eq!((all.len(), best.len(), pairs.len()), (12, 3, 3));
    let reward = |row: &Value| row["reward"].as_f64().unwrap();
    for (i, samples) in all.chunks(4).enumerate() {
        let by = |a: &&Value, b: &&Value| reward(a).total_cmp(&reward(b));
        let (low, high) = (samples.iter().min_by(by).unwrap(), samples.iter().max_by(by).unwrap());
        assert_ne!(low["output_ids"], high["output_ids"]);
        assert_eq!(best[i]["output_ids"], high["output_ids"]);
        assert_eq!(best[i]["example"], i);
        assert_eq!(floats(&best[i]["rewards"]), samples.iter().map(reward).collect::<Vec<_>>());
        assert_eq!(pairs[i]["prompt_ids"], high["input_ids"]);
        assert_eq!(pairs[i]["chosen_ids"], high["output_ids"]);
        assert_eq!(pairs[i]["rejected_ids"], low["output_ids"]);
        assert_eq!(pairs[i]["chosen_reward"], high["reward"]);
        assert_eq!(pairs[i]["rejected_reward"], low["reward"]);
    }
    // gone on with, then learned from
    let path = dir.join("pairs.jsonl");
    let file = ["--out", path.to_str().unwrap()];
    assert!(keep("pair", &file).status.success());
    let whole = std::fs::read_to_string(&path).unwrap();
    let end = whole.find('\n').unwrap() + 1;
    for cut in [0, end, end + 20, whole.len()] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let done = keep("pair", &[&file[..], &["--resume"]].concat());
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert!(std::fs::read_to_string(&path).unwrap() == whole, "cut at {cut}");
    }
    let best = dir.join("best.jsonl");
    assert!(keep("best", &["--out", best.to_str().unwrap()]).status.success());
    for (algorithm, data) in [("sft", &best), ("dpo", &path)] {
        let out = dir.join(algorithm);
        let args = ["train", algorithm, "--model", m, "--steps", "1", "--eos-id", "54", "--data"];
        let paths = [data.to_str().unwrap(), "--out", out.to_str().unwrap()];
        let done = run(&[&args[..], &paths].concat());
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    // samples of one reward make no pair
    let greedy = [&args[..], &["pair", "--temperature", "0"]].concat();
    assert!(lines(&feed(&greedy, prompts)).is_empty());
    let (code, e) = refused(&feed(&["generate", "--model", m, "--keep", "best"], prompts));
    assert!(code == 2 && e.contains("`--keep`: got best, wanted --reward-model and"), "{e}");
}
