//! Rewards that ask another process, or run one.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use warpo::{Error, rollout::rewards::RewardInput};

use super::{rewards, sample, score, score_all};

/// A file of this test's own.
fn file(name: &str, text: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("warpo-rewards-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn samples() -> Vec<RewardInput> {
    let text =
        |i: u64| sample(10 + i, &"x".repeat(i as usize), &json!({"answer": i, "source": "s"}));
    (0..4).map(text).collect()
}

/// A reward `python` over a file.
fn python(name: &str, text: &str, keys: &str) -> String {
    let path = file(name, text);
    format!(r#"{{ kind = "python", file = "{}"{keys} }}"#, path.display())
}

/// A reward `command` that runs Python code over each line.
fn command(code: &str, keys: &str) -> String {
    let code = format!(
        "import json, sys, os, time\nfor line in sys.stdin:\n q = json.loads(line)\n {code}\n"
    );
    format!(r#"{{ kind = "command", command = ["python3", "-u", "-c", {}]{keys} }}"#, json!(code))
}

fn failure(toml: &str) -> String {
    match score_all(&mut rewards(toml).unwrap(), &samples()) {
        Err(e @ Error::Reward { .. }) => e.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn command_reads_and_writes_one_line_a_sample() {
    let plain = command("print(len(q['completion']) + q['answer'])", "");
    assert_eq!(score_all(&mut rewards(&plain).unwrap(), &samples()).unwrap(), [0.0, 2.0, 4.0, 6.0]);
    let named = command("print(json.dumps({'score': -0.5 if q['prompt'] == 'Q: ' else 9}))", "");
    assert_eq!(score(&named, "a", &json!({})).unwrap(), -0.5);
    // One process for all steps.
    let counts = "n = globals().get('n', 0) + 1; print(n)";
    let mut kept = rewards(&command(counts, "")).unwrap();
    score_all(&mut kept, &samples()).unwrap();
    assert_eq!(score_all(&mut kept, &samples()).unwrap(), [5.0, 6.0, 7.0, 8.0]);
}

#[test]
fn command_is_begun_again_when_it_dies() {
    // Dies once at the sample of two letters.
    let mark = file("died", "");
    std::fs::remove_file(&mark).unwrap();
    let code = format!(
        "p = {}; first = len(q['completion']) == 2 and not os.path.exists(p); \
         first and open(p, 'w').close(); first and sys.exit(3); print(1)",
        json!(mark)
    );
    let all = score_all(&mut rewards(&command(&code, "")).unwrap(), &samples());
    assert_eq!(all.unwrap(), [1.0; 4]);
    assert!(mark.exists());
    let dead = command(
        "len(q['completion']) == 2 and (print('no luck', file=sys.stderr), sys.exit(3)); print(1)",
        "",
    );
    assert_eq!(
        failure(&dead),
        "the reward `command` failed at sample 12: the process ended (exit status: 3); it said: no \
         luck (tried 3 times)"
    );
}

#[test]
fn command_has_a_time_out() {
    let start = Instant::now();
    let slow = command("time.sleep(60)", ", timeout_s = 0.3, retries = 1");
    let message = failure(&slow);
    assert!(message.contains("at sample 10: no answer within 0.3 s"), "{message}");
    assert!(message.ends_with("(tried 2 times)"), "{message}");
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn command_that_says_no_score_fails() {
    for (says, told) in [
        ("print('good')", "the answer \"good\" is no score"),
        ("print('{}')", "the answer \"{}\" is no score"),
        ("print('[1]')", "the answer \"[1]\" is no score"),
        ("print('\"1\"')", "is no score"),
        ("print()", "is no score"),
        ("print(json.dumps({'error': 'out of luck'}))", "failed at sample 10: out of luck"),
    ] {
        let message = failure(&command(says, ", retries = 0"));
        assert!(message.contains(told), "{says}: {message}");
    }
    let missing = r#"{ kind = "command", command = ["/no/such/program"], retries = 0 }"#;
    let message = failure(missing);
    assert!(message.contains("cannot start \"/no/such/program\""), "{message}");
}

/// A line more than there are questions is seen before the next question, if not at once: it would
/// be taken for an answer.
#[test]
fn a_line_too_many_is_noticed() {
    let mut one = rewards(&command("print('1\\n2', flush=True)", "")).unwrap();
    let first = score_all(&mut one, &samples());
    thread::sleep(Duration::from_secs(1));
    let e = first.and_then(|_| score_all(&mut one, &samples())).unwrap_err().to_string();
    assert!(e.contains("it wrote more than one line for a question: \""), "{e}");
}

/// A score that is none is a bad number of the step, as others are.
#[test]
fn a_score_that_is_no_number_is_a_bad_number() {
    for bad in ["nan", "inf", "-inf"] {
        for toml in [
            command(&format!("print(json.dumps({{'score': float('{bad}')}}))"), ""),
            python(
                "bad.py",
                &format!("def reward(prompt, completion, **_):\n return float('{bad}')\n"),
                "",
            ),
        ] {
            let e = score_all(&mut rewards(&toml).unwrap(), &samples()).unwrap_err();
            let Error::BadNumber { step: 7, what, samples, .. } = &e else { panic!("{e:?}") };
            assert!(what.starts_with("the score of the reward `"), "{what}");
            assert_eq!((&samples[..], e.exit_code()), (&[10][..], 4));
        }
    }
}

#[test]
fn python_calls_a_function_with_the_columns() {
    let text = "print('loading')\ndef reward(prompt, completion, answer, source):\n    \
                print('scoring')\n    assert (prompt, source) == ('Q: ', 's')\n    \
                return len(completion) == answer\n";
    let one = python("one.py", text, "");
    assert_eq!(score_all(&mut rewards(&one).unwrap(), &samples()).unwrap(), [1.0; 4]);
    let text = "def all(prompts, completions, answer, **rest):\n    assert rest == {'source': ['s'] * 4}\n    \
                return [len(c) + a for c, a in zip(completions, answer)]\n";
    let batch = python("batch.py", text, r#", batch = true, function = "all""#);
    assert_eq!(score_all(&mut rewards(&batch).unwrap(), &samples()).unwrap(), [0.0, 2.0, 4.0, 6.0]);
}

/// An answer may have more than a score; a file of a reward is a module like any other.
#[test]
fn answers_and_files_are_read_as_people_write_them() {
    let named = command("print(json.dumps({'score': 2, 'error': None}))", "");
    assert_eq!(score(&named, "a", &json!({})).unwrap(), 2.0);
    let text = "from __future__ import annotations\nfrom dataclasses import dataclass\n\
                @dataclass\nclass Judge:\n    weight: float\n\
                def reward(prompt, completion, **_):\n    return Judge(3.0).weight\n";
    assert_eq!(score(&python("classes.py", text, ""), "a", &json!({})).unwrap(), 3.0);
}

/// Ctrl-C, or a step that failed elsewhere, ends each kind that waits, with many samples before it.
#[test]
fn an_end_is_heard_while_rewards_wait() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let busy = r#"{ kind = "http", url = "http://127.0.0.1:1/", retries = 20 }"#;
    let sleeps = "import time\ndef reward(prompt, completion, **_):\n    time.sleep(20)\n";
    let code = "```\nimport time\ntime.sleep(20)\n```";
    for (toml, completion) in [
        (command("time.sleep(20)", ""), "a"),
        (python("sleeps.py", sleeps, ""), "a"),
        (format!(r#"{{ kind = "http", url = "{url}" }}"#), "a"),
        (busy.to_owned(), "a"),
        (format!("{CODE}, timeout_s = 60, workers = 1 }}"), code),
    ] {
        let mut rewards = rewards(&toml).unwrap();
        let start = Instant::now();
        let all: Vec<RewardInput> = (0..8).map(|i| sample(i, completion, &json!({}))).collect();
        let requested = || start.elapsed() > Duration::from_millis(500);
        let scored = rewards.beside((1, 8), &requested, |queue| {
            all.iter().enumerate().try_for_each(|(at, s)| queue.put(at, s.clone()))
        });
        let Err(Error::Reward { message, .. }) = scored else { panic!("{toml}: {scored:?}") };
        assert!(message.contains("the step ended before it"), "{message}");
        assert!(start.elapsed() < Duration::from_secs(10), "{toml}: {:?}", start.elapsed());
    }
}

#[test]
fn python_tracebacks_reach_the_error() {
    for (name, text, keys, told) in [
        (
            "raises.py",
            "def reward(prompt, completion, **_):\n    return 1 / len(completion)\n",
            "",
            &["ZeroDivisionError", "raises.py\", line 2", "sample 10"][..],
        ),
        ("syntax.py", "def reward(:\n", "", &["SyntaxError", "syntax.py"]),
        ("import.py", "import no_such_module\n", "", &["ModuleNotFoundError"]),
        ("named.py", "def other(): pass\n", "", &["AttributeError", "reward"]),
        ("none.py", "def reward(prompt, completion, **_):\n    pass\n", "", &["TypeError"]),
        (
            "column.py",
            "def reward(prompt, completion):\n    return 1\n",
            "",
            &["TypeError", "answer"],
        ),
        ("exits.py", "def reward(prompt, completion, **_):\n    exit(0)\n", "", &["SystemExit"]),
        (
            "short.py",
            "def reward(prompts, completions, **_):\n    return [1]\n",
            ", batch = true",
            &["reward returned 1 scores of 4 samples"],
        ),
    ] {
        let message = failure(&python(name, text, keys));
        assert!(told.iter().all(|told| message.contains(told)), "{name}: {message}");
    }
    let dies = python(
        "dies.py",
        "import os\ndef reward(prompt, completion, **_):\n    os._exit(9)\n",
        ", retries = 1",
    );
    let message = failure(&dies);
    assert!(message.contains("the process ended (exit status: 9) (tried 2 times)"), "{message}");
}

/// The processes of rewards end with them.
#[test]
fn processes_end_with_their_reward() {
    let mut one = rewards(&command("print(os.getpid())", "")).unwrap();
    let pid = score_all(&mut one, &samples()).unwrap()[0];
    let there = || std::path::Path::new(&format!("/proc/{pid}")).exists();
    assert!(there());
    drop(one);
    assert!(!there());
}

/// A server that gives its answers one by one, and the requests that it was sent.
fn server(answers: Vec<String>) -> (String, thread::JoinHandle<Vec<Value>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/score", listener.local_addr().unwrap());
    let serve = move || {
        let mut requests = Vec::new();
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut line, mut length) = (String::new(), 0);
            loop {
                line.clear();
                reader.read_line(&mut line).unwrap();
                if let Some(n) = line.to_lowercase().strip_prefix("content-length:") {
                    length = n.trim().parse().unwrap();
                }
                if line.trim().is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            requests.push(serde_json::from_slice(&body).unwrap());
            let _ = stream.write_all(answer.as_bytes());
        }
        requests
    };
    (url, thread::spawn(serve))
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

#[test]
fn http_asks_in_the_form_of_openrlhf() {
    let (url, served) = server(vec![ok(r#"{"rewards": [0.5, 1, 1.5, -2]}"#)]);
    let toml = format!(r#"{{ kind = "http", url = "{url}", labels = "answer" }}"#);
    let all = score_all(&mut rewards(&toml).unwrap(), &samples()).unwrap();
    assert_eq!(all, [0.5, 1.0, 1.5, -2.0]);
    let want = json!({
        "query": ["Q: ", "Q: x", "Q: xx", "Q: xxx"],
        "prompts": ["Q: ", "Q: ", "Q: ", "Q: "],
        "completions": ["", "x", "xx", "xxx"],
        "columns": {"answer": [0, 1, 2, 3], "source": ["s", "s", "s", "s"]},
        "labels": [0, 1, 2, 3],
    });
    assert_eq!(served.join().unwrap(), [want]);
}

#[test]
fn http_reads_chunks_and_answers_without_a_length() {
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nA;x=y\r\n{\"rewards\"\r\n\
                   7\r\n: [1,2]\r\n1\r\n}\r\n0\r\n\r\n";
    let open = "HTTP/1.0 200 OK\r\n\r\n{\"rewards\": [3, 4]}";
    let (url, served) = server(vec![chunked.into(), open.into()]);
    let toml = format!(r#"{{ kind = "http", url = "{url}", batch_size = 2 }}"#);
    let all = score_all(&mut rewards(&toml).unwrap(), &samples()).unwrap();
    assert_eq!(all, [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(served.join().unwrap()[1]["completions"], json!(["xx", "xxx"]));
}

#[test]
fn http_tries_again_and_then_fails_with_the_cause() {
    let many = "HTTP/1.1 429 Many\r\nContent-Length: 0\r\n\r\n";
    let broken = "HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy";
    let (url, served) =
        server(vec![broken.into(), String::new(), many.into(), ok(r#"{"rewards": [1, 1, 1, 1]}"#)]);
    let toml = |keys: &str| format!(r#"{{ kind = "http", url = "{url}"{keys} }}"#);
    assert_eq!(score_all(&mut rewards(&toml("")).unwrap(), &samples()).unwrap(), [1.0; 4]);
    served.join().unwrap();
    // Nobody listens there any more.
    let message = failure(&toml(", retries = 1"));
    assert!(message.contains("refused") && message.ends_with("(tried 2 times)"), "{message}");
    for (answer, told) in [
        (broken.to_owned(), "status 503: busy (tried 1 times)"),
        ("HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nno".into(), "status 404: no"),
        (ok("{}"), "the answer has no `rewards` of 4 samples"),
        (ok(r#"{"rewards": [1]}"#), "the answer has no `rewards` of 4 samples"),
        (ok(r#"{"rewards": [1, 2, 3, "4"]}"#), "the answer has no `rewards` of 4 samples"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{".into(), "disconnected"),
        ("SSH-2.0\r\n\r\n".into(), "http parse fail"),
    ] {
        let (url, served) = server(vec![answer]);
        let message = failure(&format!(r#"{{ kind = "http", url = "{url}", retries = 0 }}"#));
        assert!(message.contains(told), "{message}");
        served.join().unwrap();
    }
}

#[test]
fn http_has_a_time_out() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let toml = format!(r#"{{ kind = "http", url = "{url}", timeout_s = 0.2, retries = 0 }}"#);
    let message = failure(&toml);
    assert!(message.contains("no answer within 0.2 s"), "{message}");
}

const CODE: &str = r#"{ kind = "code", command = ["python3", "{file}"]"#;

fn ran(code: &str, keys: &str, columns: &Value) -> f64 {
    let completion = format!("Here it is:\n```python\n{code}\n```\nDone.");
    score(&format!("{CODE}{keys} }}"), &completion, columns).unwrap()
}

#[test]
fn code_is_run_and_judged_by_its_end() {
    let none = json!({});
    assert_eq!(ran("print(1)", "", &none), 1.0);
    assert_eq!(ran("raise SystemExit(1)", "", &none), 0.0);
    assert_eq!(ran("1 / 0", "", &none), 0.0);
    assert_eq!(ran("def f(:", "", &none), 0.0);
    let code = format!("{CODE} }}");
    for (text, want) in [
        ("print(1)", 0.0),
        ("```\nprint(1)", 0.0),
        ("```\n1/0\n```\nbetter:\n```py\nprint(1)\n```", 1.0),
        ("```\nprint(1)\n```\n```\n1/0\n```", 0.0),
    ] {
        assert_eq!(score(&code, text, &none).unwrap(), want, "{text}");
    }
    let tests = json!({"tests": "assert double(2) == 4\n"});
    assert_eq!(ran("def double(x):\n    return 2 * x", r#", append = "tests""#, &tests), 1.0);
    assert_eq!(ran("def double(x):\n    return x", r#", append = "tests""#, &tests), 0.0);
    // Whoever leaves before the tests has not passed them.
    for leaves in ["exit()", "import os\nos._exit(0)", "raise SystemExit"] {
        assert_eq!(ran(leaves, r#", append = "tests""#, &tests), 0.0, "{leaves}");
    }
    let both = json!({"tests": "print(double(2))", "out": "4"});
    let keys = r#", append = "tests", expect = "out""#;
    assert_eq!(ran("def double(x):\n    return 2 * x", keys, &both), 1.0);
    assert_eq!(ran("print(4)\nexit()", keys, &both), 0.0);
    // Files of the folder that Warpo began in, though it runs in another.
    let script = file("run.sh", "exec python3 \"$1\"\n");
    let up = "../".repeat(std::env::current_dir().unwrap().components().count() - 1);
    let script = format!("{up}{}", script.display().to_string().trim_start_matches('/'));
    let toml = format!(r#"{{ kind = "code", command = ["sh", "{script}"] }}"#);
    assert_eq!(score(&toml, "```\nprint(1)\n```", &none).unwrap(), 1.0);
    let io = json!({"in": "2 3\n", "out": "5"});
    let keys = r#", stdin = "in", expect = "out""#;
    assert_eq!(ran("print(sum(map(int, input().split())))", keys, &io), 1.0);
    assert_eq!(ran("print(6)", keys, &io), 0.0);
    assert_eq!(ran("print(5, file=__import__('sys').stderr)", keys, &io), 0.0);
    // Of many samples each has its own.
    let text = |i: usize| format!("```\nprint({})\n```", i % 3);
    let all: Vec<_> = (0..9).map(|i| sample(i as u64, &text(i), &json!({"out": i % 2}))).collect();
    let mut rewards = rewards(&format!(r#"{CODE}, expect = "out", workers = 3 }}"#)).unwrap();
    let want: Vec<f64> = (0..9).map(|i| f64::from(u8::from(i % 3 == i % 2))).collect();
    assert_eq!(score_all(&mut rewards, &all).unwrap(), want);
}

#[test]
fn code_has_limits() {
    let none = json!({});
    let start = Instant::now();
    assert_eq!(ran("while True: pass", ", timeout_s = 1", &none), 0.0);
    assert_eq!(ran("import time; time.sleep(60)", ", timeout_s = 1", &none), 0.0);
    // A process that it leaves behind holds its output open.
    let leaves = "import subprocess\nsubprocess.Popen(['sleep', '60'])";
    ran(leaves, "", &none);
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    assert_eq!(ran("x = bytearray(300 << 20)", "", &none), 1.0);
    assert_eq!(ran("x = bytearray(300 << 20)", ", memory_mb = 200", &none), 0.0);
    assert_eq!(ran("print('x' * 100000)", ", output_kb = 200", &none), 1.0);
    assert_eq!(ran("print('x' * 100000)", ", output_kb = 50", &none), 0.0);
    assert_eq!(ran("while True: print('x' * 100000)", "", &none), 0.0);
}

/// Neither the environment of Warpo nor its folder is that of the program, and its folder is gone
/// when it ends.
#[test]
fn code_runs_in_a_folder_of_its_own() {
    let none = json!({});
    assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
    let code = "import os\nassert 'CARGO_MANIFEST_DIR' not in os.environ\n\
                assert os.listdir() == ['sample.py'] and os.environ['HOME'] == os.getcwd()\n\
                assert 'warpo-code' in os.getcwd()\nopen('left', 'w').write('x')";
    assert_eq!(ran(code, "", &none), 1.0);
    let own = format!("warpo-code-{}-", std::process::id());
    let left = std::fs::read_dir(std::env::temp_dir()).unwrap().filter_map(|e| e.ok());
    let mut left = left.map(|e| e.path()).filter(|p| p.to_string_lossy().contains(&own));
    assert!(left.all(|p| !p.join("left").exists()));
}

/// Where the kernel makes namespaces for users, a program finds no network; where it does not, who
/// wants none is refused.
#[test]
fn code_has_no_network_where_the_kernel_allows() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let code = format!("import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)");
    let apart = std::process::Command::new("unshare").args(["-r", "-n", "true"]).status();
    let none = json!({});
    assert_eq!(ran(&code, r#", network = "allow""#, &none), 1.0);
    if apart.is_ok_and(|status| status.success()) {
        assert_eq!(ran(&code, "", &none), 0.0);
        assert_eq!(ran(&code, r#", network = "deny""#, &none), 0.0);
        assert_eq!(ran("print(1)", r#", network = "deny""#, &none), 1.0);
    } else {
        let denied = rewards(&format!(r#"{CODE}, network = "deny" }}"#));
        assert!(denied.err().unwrap().to_string().contains("`network` is \"deny\""));
    }
}
