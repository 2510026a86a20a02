//! G8: the first signal asks, the second ends. Signals reach whole processes, so each case is one.

use std::{
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

use warpo::train::signals::{Hold, install, requested};

use crate::support::{
    process,
    runs::{small, train_command},
    temp_dir, wait_for,
};

/// The other process: reports what it sees, then does not stop by itself.
#[test]
#[ignore = "a process of the tests below"]
fn listener() {
    let Some(dir) = std::env::var_os("WARPO_TEST_DIR") else { return };
    assert_eq!(requested(), None);
    install().unwrap();
    install().unwrap();
    assert_eq!(requested(), None);
    let dir = Path::new(&dir);
    let hold = Hold::new();
    // A part that held before holds no more.
    drop(Hold::new());
    let _hold = if dir.ends_with("held") {
        Some(hold)
    } else {
        drop(hold);
        None
    };
    std::fs::write(dir.join("ready"), "").unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    while Instant::now() < end {
        if let Some(signal) = requested() {
            std::fs::write(dir.join(signal), "").unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn kill(child: &Child, signal: &str) {
    let status = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status();
    assert!(status.unwrap().success());
}

#[test]
fn the_first_signal_asks_and_the_second_ends_the_process() {
    for (first, second, code) in [("INT", "INT", 130), ("TERM", "TERM", 143), ("INT", "TERM", 143)]
    {
        let dir = temp_dir(&format!("signals_{first}_{second}")).join("held");
        std::fs::create_dir_all(&dir).unwrap();
        let mut child = process("train::signals::listener", &dir);
        wait_for(&dir.join("ready"));
        kill(&child, first);
        wait_for(&dir.join(format!("SIG{first}")));
        assert!(child.try_wait().unwrap().is_none(), "still finishing its step");
        kill(&child, second);
        assert_eq!(child.wait().unwrap().code(), Some(code), "{first} {second}");
    }
}

/// Where nothing would be lost, the first one ends it.
#[test]
fn a_process_that_holds_nothing_ends_at_once() {
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let dir = temp_dir(&format!("signals_free_{signal}"));
        let mut child = process("train::signals::listener", &dir);
        wait_for(&dir.join("ready"));
        kill(&child, signal);
        assert_eq!(child.wait().unwrap().code(), Some(code), "{signal}");
    }
}

/// While a long file is read, too: it is not read to its end.
#[test]
fn reading_is_interrupted() {
    let dir = temp_dir("signals_reading");
    let fifo = dir.join("data");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let mut pairs = small(&dir, "sft", &dir.join("run"));
    pairs.push(format!("data={}", fifo.display()));
    let mut child = train_command("sft", &pairs).spawn().unwrap();
    // It opens when the reader does, and never ends.
    let _writer = std::fs::OpenOptions::new().write(true).open(&fifo).unwrap();
    kill(&child, "INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!dir.join("run").exists());
}
