//! `code`: the last code block of a sample, run by a command: 1 if it ends with status 0, and
//! prints what a column says, if one does; else 0.
//!
//! A run has a folder of its own, an environment of PATH, HOME, TMPDIR and LANG alone, and limits
//! of time, CPU time, memory of a process, size of a file, and output; when it ends, all of its
//! process group is killed. Where the kernel lets users make namespaces (`unshare`), it has no
//! network and its processes cannot outlive it. That guards against mistakes and loops, not against
//! malice: it may read and write whatever the user of Warpo may, start many processes, and leave
//! its group where there are no namespaces. Run Warpo in a container of its own to let models that
//! you do not trust write programs.

use std::{
    collections::hash_map::RandomState,
    env, fs,
    hash::{BuildHasher, Hasher},
    io::{ErrorKind, Read},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use super::{AnswerColumn, Options, RewardFailure, RewardInput, SampleReward, Stop, last_block};
use crate::{
    data::{ColumnsRead, RowColumns},
    device::kill_group,
    error::Result,
};

crate::choices! {
    /// Whether programs reach the network: not where the kernel allows to forbid it, never, or
    /// always.
    pub enum Network { Auto = "auto", Deny = "deny", Allow = "allow" }
}

struct CodeReward {
    command: Vec<String>,
    extension: String,
    /// Columns: text behind the program, its input, its output.
    append: Option<AnswerColumn>,
    input: Option<AnswerColumn>,
    expect: Option<AnswerColumn>,
    timeout: Duration,
    memory_mb: u64,
    output: u64,
    workers: usize,
    /// What stands before the command, so that it has namespaces of its own.
    apart: Vec<String>,
    /// A line of Python behind the appended text prints what only it knows.
    marks: bool,
}

/// Numbers the folders of this process.
static FOLDERS: AtomicUsize = AtomicUsize::new(0);

/// `command`, a list in which `{file}` is the program's file (at the end, if it is nowhere);
/// `extension` (py); columns `append` (tests behind the program), `stdin` and `expect` (its output,
/// white space at the ends apart); `timeout_s` (10), `memory_mb` (1024), `output_kb` (64),
/// `workers` (as many as cores), `network` (auto, deny, allow).
pub fn code(options: &mut Options<'_>) -> Result<Box<dyn SampleReward>> {
    let mut command: Vec<String> = options.need("command")?;
    let program = command.first().cloned().unwrap_or_default();
    if !is_program(&program) {
        return Err(options.error(format!("`command`: there is no program {program:?}")));
    }
    // Programs run in a folder of their own: files of the present one are named from the root.
    for (i, word) in command.iter_mut().enumerate() {
        let is_path = i > 0 || word.contains('/');
        if is_path && Path::new(&*word).is_file() {
            // Links stay: an interpreter of a virtual environment is one.
            let path = std::path::absolute(&*word).unwrap_or_else(|_| PathBuf::from(&*word));
            *word = path.to_string_lossy().into_owned();
        }
    }
    if !command.iter().any(|word| word.contains("{file}")) {
        command.push("{file}".into());
    }
    let extension = options.take("extension")?.unwrap_or_else(|| "py".to_owned());
    if !extension.chars().all(|c| c.is_ascii_alphanumeric()) {
        return Err(options.error(format!("`extension` is {extension:?}, wanted letters")));
    }
    let apart = match options.take("network")?.unwrap_or(Network::Auto) {
        Network::Allow => Vec::new(),
        network => {
            let apart = namespaces();
            if apart.is_empty() && network == Network::Deny {
                let why = "`network` is \"deny\", which this kernel does not let users do";
                return Err(options.error(why));
            }
            apart
        }
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let mut column = |key| options.take::<String>(key).map(|name| name.map(AnswerColumn::named));
    let (append, input, expect) = (column("append")?, column("stdin")?, column("expect")?);
    let marks = extension == "py";
    if append.is_some() && expect.is_none() && !marks {
        let why = "`append` wants `expect` beside it: a program that exits before would pass";
        return Err(options.error(why));
    }
    let reward = CodeReward {
        command,
        extension,
        append,
        input,
        expect,
        timeout: Duration::from_secs_f64(options.number("timeout_s", 10.0, (0.01, 1e6))?),
        memory_mb: options.number("memory_mb", 1024.0, (1.0, 1e9))? as u64,
        output: options.number("output_kb", 64.0, (1.0, 1e6))? as u64 * 1024,
        workers: options.number("workers", cores as f64, (1.0, 1024.0))? as usize,
        apart,
        marks,
    };
    // What fails here would fail for every sample, as if all were wrong.
    let mut test = reward.limited();
    test.arg("true").stdin(Stdio::null()).stdout(Stdio::null());
    let out = test.output().map_err(|e| options.error(format!("cannot run sh: {e}")))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr).trim().to_owned();
        return Err(options.error(format!("the limits cannot be set here: {said}")));
    }
    Ok(Box::new(reward))
}

/// Whether a program of this name is there.
fn is_program(name: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).any(|dir| dir.join(name).is_file());
    !name.is_empty() && if name.contains('/') { Path::new(name).is_file() } else { found }
}

/// The command that runs another in namespaces of its own, the strictest that works here; empty if
/// none does.
fn namespaces() -> Vec<String> {
    // A Warpo that is killed takes them with it.
    let strict = "setpriv --pdeathsig KILL unshare -r -n -p -f --kill-child";
    let strict = &strict.split(' ').collect::<Vec<_>>()[..];
    let works = |command: &&[&str]| {
        let mut test = Command::new(command[0]);
        test.args(&command[1..]).arg("true").stdin(Stdio::null()).stdout(Stdio::null());
        test.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    let found = [strict, &strict[3..], &strict[3..6]].into_iter().find(works).unwrap_or_default();
    found.iter().map(|word| (*word).to_owned()).collect()
}

/// A folder that is removed with all in it.
struct TempFolder(PathBuf);

impl TempFolder {
    fn new() -> std::io::Result<Self> {
        let n = FOLDERS.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("warpo-code-{}-{n}", std::process::id()));
        match fs::create_dir(&path) {
            // Left by a process that was killed, which had this number.
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Self::new(),
            made => made.map(|()| Self(path)),
        }
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl CodeReward {
    fn run(&self, sample: &RewardInput, stop: &Stop<'_>) -> Result<f64, String> {
        stop.check()?;
        let Some(mut program) = last_block(&sample.completion) else { return Ok(0.0) };
        let text = |column: &Option<AnswerColumn>| {
            column.as_ref().map(|c| c.text(&sample.columns)).transpose()
        };
        // Whoever exits before the tests does not print it.
        let mut mark = None;
        if let Some(tests) = text(&self.append)? {
            program += &tests;
            if self.marks {
                let random = RandomState::new().build_hasher().finish();
                program += &format!("\nprint(\"\\n{random:016x}\")\n");
                mark = Some(format!("{random:016x}"));
            }
        }
        let io = |what: &'static str| move |e: std::io::Error| format!("cannot {what}: {e}");
        let folder = TempFolder::new().map_err(io("make a folder"))?;
        let (file, input) =
            (folder.0.join(format!("sample.{}", self.extension)), folder.0.join("stdin"));
        fs::write(&file, program).map_err(io("write the program"))?;
        let stdin = match text(&self.input)? {
            None => Stdio::null(),
            Some(text) => {
                fs::write(&input, text).map_err(io("write the input"))?;
                fs::File::open(&input).map_err(io("open the input"))?.into()
            }
        };
        let expected = text(&self.expect)?;
        let ran = self.execute(&folder.0, &file, stdin, stop).map_err(io("run the command"))?;
        stop.check()?;
        let right = |out: Vec<u8>| {
            let out = String::from_utf8_lossy(&out);
            let all = out.trim_end();
            let printed = match &mark {
                None => Some(all),
                Some(mark) => all.strip_suffix(&**mark),
            };
            let is_expected =
                |out: &str| expected.as_ref().is_none_or(|text| out.trim() == text.trim());
            printed.is_some_and(is_expected)
        };
        Ok(f64::from(u8::from(ran.is_some_and(right))))
    }

    /// What runs a command that is given to it within the limits.
    fn limited(&self) -> Command {
        // Memory in KiB, CPU time in seconds, files in blocks of 512 bytes (1024 in some shells).
        const LIMITED: &str =
            "ulimit -c 0 && ulimit -v $1 && ulimit -t $2 && ulimit -f $3 && shift 3 && exec \"$@\"";
        let memory = (self.memory_mb * 1024).to_string();
        let seconds = (self.timeout.as_secs() + 1).to_string();
        let blocks = (self.memory_mb * 2048).to_string();
        let mut words = self.apart.clone();
        words.extend(["sh", "-c", LIMITED, "sh", &memory, &seconds, &blocks].map(str::to_owned));
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        command
    }

    /// Runs the program; its output, if it ended well within its limits.
    fn execute(
        &self,
        folder: &Path,
        file: &Path,
        stdin: Stdio,
        stop: &Stop<'_>,
    ) -> std::io::Result<Option<Vec<u8>>> {
        let file = file.to_string_lossy();
        let mut command = self.limited();
        command.args(self.command.iter().map(|word| word.replace("{file}", &file)));
        command.current_dir(folder).stdin(stdin).process_group(0);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).env_clear();
        command.env("PATH", env::var_os("PATH").unwrap_or_default()).env("LANG", "C.UTF-8");
        let mut child = command.env("HOME", folder).env("TMPDIR", folder).spawn()?;
        let end = Instant::now() + self.timeout;
        let (sender, output) = mpsc::channel();
        let most = self.output;
        let read = |pipe: Option<Box<dyn Read + Send>>, is_out: bool| {
            let sender = sender.clone();
            thread::spawn(move || {
                let mut all = Vec::new();
                let done = pipe.map(|pipe| pipe.take(most + 1).read_to_end(&mut all));
                let ok = matches!(done, Some(Ok(n)) if n as u64 <= most);
                let _ = sender.send((is_out, ok.then_some(all)));
            });
        };
        read(child.stdout.take().map(|p| Box::new(p) as _), true);
        read(child.stderr.take().map(|p| Box::new(p) as _), false);
        let (mut out, mut within, mut status) = (None, true, None);
        let mut take = |(is_out, text): (bool, Option<Vec<u8>>)| {
            within &= text.is_some();
            if is_out {
                out = text;
            }
            within
        };
        let mut read = 0;
        while status.is_none() && Instant::now() < end && stop.check().is_ok() {
            if let Ok(text) = output.recv_timeout(Duration::from_millis(2)) {
                read += 1;
                if !take(text) {
                    break;
                }
            }
            if read == 2 {
                thread::sleep(Duration::from_millis(2));
            }
            status = child.try_wait()?;
        }
        kill_group(child.id());
        child.wait()?;
        // Whoever left the group may hold the pipes.
        while read < 2 {
            let Ok(text) = output.recv_timeout(Duration::from_secs(1)) else { return Ok(None) };
            read += 1;
            take(text);
        }
        let good = within && status.is_some_and(|status| status.success());
        Ok(out.filter(|_| good))
    }
}

impl SampleReward for CodeReward {
    fn columns(&self) -> ColumnsRead {
        let all = [&self.append, &self.input, &self.expect].into_iter().flatten();
        all.map(AnswerColumn::columns).fold(ColumnsRead::None, ColumnsRead::and)
    }

    fn admit(&self, row: &RowColumns) -> Result<(), String> {
        let mut all = [&self.append, &self.input, &self.expect].into_iter().flatten();
        all.try_for_each(|column| column.text(row).map(drop))
    }

    fn score(
        &mut self,
        samples: &[RewardInput],
        stop: &Stop<'_>,
    ) -> Result<Vec<f64>, RewardFailure> {
        let (next, this) = (&AtomicUsize::new(0), &*self);
        let work = || {
            let mut done = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(sample) = samples.get(at) else { return done };
                done.push((at, this.run(sample, stop)));
            }
        };
        let mut all: Vec<(usize, Result<f64, String>)> = thread::scope(|scope| {
            let workers = this.workers.min(samples.len());
            let started: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            started.into_iter().flat_map(|w| w.join().unwrap_or_default()).collect()
        });
        all.sort_by_key(|(at, _)| *at);
        if all.len() < samples.len() {
            return Err(RewardFailure { at: 0, cause: "a thread panicked".into() });
        }
        let one = |(at, score): (usize, Result<f64, String>)| {
            score.map_err(|cause| RewardFailure { at, cause })
        };
        all.into_iter().map(one).collect()
    }
}
