//! G8: two trainers in one folder, the second is refused.

use std::{path::Path, time::Duration};

use warpo::{Error, train::lock::Lock};

use crate::support::{process, temp_dir, wait_for};

#[test]
fn the_second_trainer_is_refused_until_the_first_ends() {
    let dir = temp_dir("lock");
    let first = Lock::acquire(&dir).unwrap();
    assert_eq!(first.taken_over(), None);
    let error = Lock::acquire(&dir).unwrap_err();
    let pid = std::process::id();
    assert!(matches!(&error, Error::Locked { path, pid: p } if *path == dir && *p == pid));
    assert_eq!(error.to_string(), format!("{} is in use by process {pid}", dir.display()));
    assert_eq!(error.exit_code(), 5);
    drop(first);
    let again = Lock::acquire(&dir).unwrap();
    assert_eq!(again.taken_over(), None, "it was released, not abandoned");
}

/// The other process: takes the lock and waits to be killed.
#[test]
#[ignore = "a process of the test below"]
fn owner() {
    let Some(dir) = std::env::var_os("WARPO_TEST_DIR") else { return };
    let _lock = Lock::acquire(Path::new(&dir)).unwrap();
    std::fs::write(Path::new(&dir).join("ready"), "").unwrap();
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn the_lock_of_a_killed_process_is_taken_over() {
    let dir = temp_dir("lock_killed");
    let mut owner = process("train::lock::owner", &dir);
    wait_for(&dir.join("ready"));
    let error = Lock::acquire(&dir).unwrap_err();
    assert!(matches!(error, Error::Locked { pid, .. } if pid == owner.id()), "{error}");
    owner.kill().unwrap();
    owner.wait().unwrap();
    let lock = Lock::acquire(&dir).unwrap();
    assert_eq!(lock.taken_over(), Some(owner.id()));
    // and it is a lock
    let error = Lock::acquire(&dir).unwrap_err();
    assert!(matches!(error, Error::Locked { pid, .. } if pid == std::process::id()));
}

#[test]
fn any_content_can_be_taken_over_and_a_missing_folder_is_named() {
    let dir = temp_dir("lock_junk");
    for junk in [&b""[..], b"pid", b"pid x\nboot y", b"\xff\xfe\0", &[b'9'; 100_000]] {
        std::fs::write(dir.join("lock"), junk).unwrap();
        assert_eq!(Lock::acquire(&dir).unwrap().taken_over(), None);
    }
    std::fs::write(dir.join("lock"), "pid 4000000000\nboot of-another-day\n").unwrap();
    assert_eq!(Lock::acquire(&dir).unwrap().taken_over(), Some(4_000_000_000));
    let error = Lock::acquire(&dir.join("none")).unwrap_err().to_string();
    assert!(error.starts_with(&format!("cannot create {}/none/lock: ", dir.display())), "{error}");
}
