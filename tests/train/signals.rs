//! G8: the first signal asks, the second ends. Signals reach whole processes, so each case is one.

use std::{
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

use warpo::train::signals::{install, requested};

use crate::support::{process, temp_dir, wait_for};

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
        let dir = temp_dir(&format!("signals_{first}_{second}"));
        let mut child = process("train::signals::listener", &dir);
        wait_for(&dir.join("ready"));
        kill(&child, first);
        wait_for(&dir.join(format!("SIG{first}")));
        assert!(child.try_wait().unwrap().is_none(), "still finishing its step");
        kill(&child, second);
        assert_eq!(child.wait().unwrap().code(), Some(code), "{first} {second}");
    }
}
