//! Compiles the simulator and the kernels for it.

use std::{
    collections::hash_map::DefaultHasher,
    ffi::OsStr,
    fs,
    hash::{Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

use super::{Variant, scan};

/// One compilation of the simulator; objects are named after all that goes into them, so that what
/// did not change is not compiled again.
pub(super) struct Build {
    variant: Variant,
    /// Of g++ and of the files that all kernels include.
    common: u64,
    kernels: PathBuf,
    out: PathBuf,
}

const FLAGS: [&str; 10] = [
    "-std=c++17",
    "-O2",
    // It makes one function of add_product for arrays of 8 and of 16, and then warns of the 8.
    "-fno-ipa-icf",
    "-g1",
    "-fPIC",
    // What sim.cpp exports says so: calls inside of the library take no detour.
    "-fvisibility=hidden",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
];

impl Build {
    pub(super) fn new(variant: Variant, version: &[u8]) -> Self {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sim");
        fs::create_dir_all(&out).unwrap();
        let mut h = DefaultHasher::new();
        (version, FLAGS, variant.flags()).hash(&mut h);
        for file in files(&kernels.join("include"), "cuh") {
            fs::read(file).unwrap().hash(&mut h);
        }
        fs::read(kernels.join("sim/sim.h")).unwrap().hash(&mut h);
        Self { variant, common: h.finish(), kernels, out }
    }

    pub(super) fn library(&self) -> PathBuf {
        let mut sources = files(&self.kernels, "cu");
        sources.extend(files(&self.kernels.join("sim"), "cu"));
        sources.push(self.kernels.join("sim/sim.cpp"));
        let (queue, objects) = (Mutex::new(sources.iter()), Mutex::new(Vec::new()));
        let next = || queue.lock().unwrap().next();
        std::thread::scope(|scope| {
            for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(|| {
                    while let Some(source) = next() {
                        let object = self.object(source);
                        objects.lock().unwrap().push(object);
                    }
                });
            }
        });
        let mut objects = objects.into_inner().unwrap();
        objects.sort();
        self.make("libsim", "so", objects.hash_with(self.common), |to| {
            let mut command = Command::new("g++");
            command.arg("-shared").args(self.variant.flags().0).arg("-o").arg(to).args(&objects);
            command
        })
    }

    fn object(&self, source: &Path) -> PathBuf {
        let mut text = fs::read_to_string(source).unwrap();
        let runtime = source.extension() == Some(OsStr::new("cpp"));
        if runtime {
            let parts = files(&self.kernels.join("sim"), "h");
            text.extend(parts.iter().map(|part| fs::read_to_string(part).unwrap()));
        }
        let stem = source.file_stem().unwrap().to_str().unwrap();
        self.make(stem, "o", text.hash_with(self.common), |to| {
            let mut command = Command::new("g++");
            command.args(FLAGS).arg("-c").arg("-o").arg(to);
            let (kernel, sim) = self.variant.flags();
            if runtime {
                command.args(sim).arg(source);
                return command;
            }
            // The file itself, then a line for each of its entries.
            let mut wrapped = format!("#include \"{}\"\n", source.display());
            for e in scan::entries(&scan::source(source).unwrap()).unwrap() {
                let scan::Entry { name, threads, cluster, beside, .. } = e;
                wrapped += &format!("SIM_ENTER({name}, {threads}, {cluster}, {beside})\n");
            }
            let wrapper = to.with_extension("cpp");
            fs::write(&wrapper, wrapped).unwrap();
            command.args(kernel).arg("-include").arg(self.kernels.join("sim/sim.h")).arg(wrapper);
            command
        })
    }

    /// The file of this name and hash, made aside if it is not there.
    fn make(&self, stem: &str, end: &str, hash: u64, how: impl Fn(&Path) -> Command) -> PathBuf {
        let file = self.out.join(format!("{stem}-{}-{hash:016x}.{end}", self.variant.name()));
        if !file.exists() {
            let aside = file.with_extension(format!("{}.tmp", std::process::id()));
            run(&mut how(&aside));
            fs::rename(&aside, &file).unwrap();
        }
        file
    }
}

trait HashWith: Hash {
    fn hash_with(&self, common: u64) -> u64 {
        let mut h = DefaultHasher::new();
        common.hash(&mut h);
        self.hash(&mut h);
        h.finish()
    }
}
impl<T: Hash + ?Sized> HashWith for T {}

/// The files of a folder that end in `.end`, sorted.
pub fn files(dir: &Path, end: &str) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    all.retain(|p| p.extension() == Some(OsStr::new(end)));
    all.sort();
    all
}

/// What a command prints; panics if it fails.
pub(super) fn run(command: &mut Command) -> String {
    let done = command.output().unwrap();
    let text = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
    assert!(done.status.success(), "{command:?}:\n{text}");
    text
}
