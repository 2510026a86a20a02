//! Property 8: nothing is lost. Power fails, disks fail, bits flip; what loads is what was saved.

use std::{
    collections::HashSet,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use serde_json::json;
use warpo::{
    Error, Result,
    rng::{Philox, Purpose},
    storage::{Disk, Storage},
    train::checkpoint::{
        Dtype, LoadedCheckpoint, Saved, SavedTensor, clean, list, load_newest, save,
    },
};

use crate::support::disk::{Fate, Fault, MemDisk};

const DIR: &str = "/checkpoints";

/// The state after `step`: every number depends on it.
struct Run {
    weights: Vec<f32>,
    moments: Vec<f64>,
    counts: Vec<u32>,
    ids: Vec<u64>,
}

impl Run {
    fn at(step: u64, size: usize) -> Self {
        let s = Philox::new(9, step, 0, Purpose::Init);
        let n = |i: usize| s.normal(i as u32);
        Self {
            weights: (0..6 * size).map(|i| n(i) as f32).collect(),
            moments: (0..size).map(n).collect(),
            counts: (0..3).map(|i| s.block(i)[1]).collect(),
            ids: vec![u64::MAX - step],
        }
    }

    fn save(&self, disk: &dyn Storage, dir: &Path, step: u64, keep: usize) -> Result<Saved> {
        let tensors = [
            SavedTensor::new("model", "h.0.weight", &[6, self.moments.len()], &self.weights),
            SavedTensor::new("optimizer", "counts", &[3], &self.counts),
            SavedTensor::new("optimizer", "m/h.0.weight", &[self.moments.len()], &self.moments),
            SavedTensor::new("optimizer", "ids", &[], &self.ids),
            SavedTensor::new("optimizer", "empty", &[0, 4], &[0.0f32; 0]),
        ];
        save(disk, dir, step, keep, tensors, &json!({"step": step, "cursor": step * 7, "kl": 0.1}))
    }

    /// Loads everything and compares every bit.
    fn check(loaded: &LoadedCheckpoint, disk: &dyn Storage) {
        let size = loaded.tensors().find(|t| t.name == "m/h.0.weight").unwrap().shape[0];
        let want = Self::at(loaded.step, size);
        assert_eq!(loaded.state["cursor"], loaded.step * 7);
        let mut got = Self::at(99, size);
        loaded.read(disk, "model", "h.0.weight", &mut got.weights).unwrap();
        loaded.read(disk, "optimizer", "m/h.0.weight", &mut got.moments).unwrap();
        loaded.read(disk, "optimizer", "counts", &mut got.counts).unwrap();
        loaded.read(disk, "optimizer", "ids", &mut got.ids).unwrap();
        assert_eq!(
            bytemuck::cast_slice::<_, u32>(&want.weights),
            bytemuck::cast_slice::<_, u32>(&got.weights)
        );
        assert_eq!(
            bytemuck::cast_slice::<_, u64>(&want.moments),
            bytemuck::cast_slice::<_, u64>(&got.moments)
        );
        assert_eq!((want.counts, want.ids), (got.counts, got.ids));
    }
}

fn newest(disk: &dyn Storage) -> Option<u64> {
    let loaded = load_newest(disk, Path::new(DIR)).unwrap()?;
    Run::check(&loaded, disk);
    Some(loaded.step)
}

fn put(disk: &MemDisk, step: u64) -> Result<Saved> {
    Run::at(step, 2).save(disk, Path::new(DIR), step, 2)
}

fn stray(disk: &MemDisk) -> bool {
    disk.list(Path::new(DIR)).unwrap_or_default().iter().any(|n| n.contains("tmp"))
}

/// A run that has saved steps 1..=n.
fn history(n: u64) -> MemDisk {
    let disk = MemDisk::new();
    for step in 1..=n {
        assert!(put(&disk, step).unwrap().problems.is_empty());
    }
    disk
}

/// Every fate of every waiting effect if there are few, else all-lost, all-kept and random ones.
pub fn fates(waiting: &[Option<usize>], seed: u64) -> HashSet<Vec<Fate>> {
    let choices = |w: &Option<usize>| match w {
        None => vec![Fate::Lost, Fate::Kept],
        Some(n) => vec![
            Fate::Lost,
            Fate::Kept,
            Fate::Torn(1),
            Fate::Torn(n / 2),
            Fate::Torn(n.saturating_sub(1)),
            Fate::Zeros,
        ],
    };
    let options: Vec<_> = waiting.iter().map(choices).collect();
    let all = options.iter().map(Vec::len).fold(1, usize::saturating_mul);
    let pick = |mut index: usize| {
        let mut fates = Vec::new();
        for o in &options {
            fates.push(o[index % o.len()]);
            index /= o.len();
        }
        fates
    };
    if all <= 64 {
        return (0..all).map(pick).collect();
    }
    let draw = Philox::new(seed, 0, 0, Purpose::Pairs);
    let random = (0..62).map(|i| {
        let one =
            |(j, o): (usize, &Vec<Fate>)| o[draw.below(i * 64 + j as u32, o.len() as u32) as usize];
        options.iter().enumerate().map(one).collect()
    });
    let ends = [Fate::Lost, Fate::Kept].map(|f| vec![f; waiting.len()]);
    random.chain(ends).collect()
}

/// Crashes `put(step)` before each of its operations and after the last, in every way; `held` is
/// what loads before it.
fn crash_everywhere(before: &MemDisk, step: u64, held: Option<u64>) -> usize {
    let mut states = 0;
    for at in 1.. {
        let disk = before.snapshot();
        disk.arm(at, Fault::Crash);
        let done = put(&disk, step).is_ok_and(|saved| saved.problems.is_empty());
        for fates in fates(&disk.waiting(), at as u64) {
            let after = disk.after_crash(&fates);
            let what = || format!("step {step}, operation {at}, {fates:?}");
            clean(&after, Path::new(DIR)).unwrap();
            assert!(!stray(&after), "{}", what());
            let got = newest(&after);
            assert!(got == Some(step) || (got == held && !done), "{}: got {got:?}", what());
            // and the run goes on from there
            let next = got.unwrap_or(0) + 1;
            put(&after, next).unwrap();
            assert_eq!(newest(&after), Some(next), "{}", what());
            states += 1;
        }
        if done {
            return states;
        }
    }
    unreachable!()
}

/// G2 in small.
#[test]
fn a_crash_at_any_point_loses_at_most_the_last_interval() {
    let mut states = crash_everywhere(&MemDisk::new(), 1, None);
    states += crash_everywhere(&history(1), 2, Some(1));
    // with an old one to delete
    states += crash_everywhere(&history(3), 4, Some(3));
    // over one of the same step
    states += crash_everywhere(&history(3), 3, Some(3));
    println!("{states} crash states");
    assert!(states >= 2000, "{states}");
}

/// The model of the disk must be able to hurt: without the syncs the same test finds losses.
#[test]
fn the_crash_model_bites() {
    struct NoSync<'a>(&'a MemDisk, bool);
    struct NoSyncFile(Box<dyn warpo::storage::StorageFile>);
    impl warpo::storage::StorageFile for NoSyncFile {
        fn append(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.append(bytes)
        }
        fn sync(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    impl Storage for NoSync<'_> {
        fn create_dir(&self, p: &Path) -> std::io::Result<()> {
            self.0.create_dir(p)
        }
        fn create(&self, p: &Path) -> std::io::Result<Box<dyn warpo::storage::StorageFile>> {
            let file = self.0.create(p)?;
            Ok(if self.1 { file } else { Box::new(NoSyncFile(file)) })
        }
        fn append_after(
            &self,
            p: &Path,
            len: u64,
        ) -> std::io::Result<Box<dyn warpo::storage::StorageFile>> {
            self.0.append_after(p, len)
        }
        fn sync_dir(&self, p: &Path) -> std::io::Result<()> {
            if self.1 { Ok(()) } else { self.0.sync_dir(p) }
        }
        fn rename(&self, a: &Path, b: &Path) -> std::io::Result<()> {
            self.0.rename(a, b)
        }
        fn remove(&self, p: &Path) -> std::io::Result<()> {
            self.0.remove(p)
        }
        fn list(&self, p: &Path) -> std::io::Result<Vec<String>> {
            self.0.list(p)
        }
        fn open(&self, p: &Path) -> std::io::Result<Box<dyn warpo::storage::ReadSeek>> {
            self.0.open(p)
        }
        fn free_space(&self, _: &Path) -> Option<u64> {
            None
        }
    }
    for only_files in [false, true] {
        let disk = MemDisk::new();
        Run::at(1, 2).save(&NoSync(&disk, only_files), Path::new(DIR), 1, 2).unwrap();
        let lost = fates(&disk.waiting(), 0).into_iter().any(|fates| {
            let after = disk.after_crash(&fates);
            !matches!(load_newest(&after, Path::new(DIR)), Ok(Some(_)))
        });
        assert!(lost, "files synced: {only_files}");
    }
}

fn files(disk: &MemDisk, step: u64) -> Vec<PathBuf> {
    let dir = Path::new(DIR).join(format!("step-{step}"));
    disk.list(&dir).unwrap().into_iter().map(|n| dir.join(n)).collect()
}

/// G3 in small: all bit flips, all truncations, and one byte more.
#[test]
fn every_flipped_bit_and_every_truncation_is_refused_by_name() {
    let disk = history(1);
    Run::at(2, 180).save(&disk, Path::new(DIR), 2, 2).unwrap();
    let (mut flips, mut cuts, mut named) = (0, 0, HashSet::new());
    for path in files(&disk, 2) {
        let good = disk.get(&path);
        let mut refused = |bytes: Vec<u8>, what: String| {
            disk.set(&path, bytes);
            let loaded = load_newest(&disk, Path::new(DIR)).unwrap().unwrap();
            assert_eq!(loaded.step, 1, "{path:?} {what}");
            let [Error::File { path: at, message }] = &loaded.skipped[..] else {
                panic!("{path:?} {what}: {:?}", loaded.skipped)
            };
            assert_eq!(at, &path, "{what}: {message}");
            named.extend(message.split('`').nth(1).map(str::to_owned));
        };
        for i in 0..good.len() {
            refused(good[..i].to_vec(), format!("cut at {i}"));
            cuts += 1;
            for bit in 0..8 {
                let mut bytes = good.clone();
                bytes[i] ^= 1 << bit;
                refused(bytes, format!("byte {i} bit {bit}"));
                flips += 1;
            }
        }
        let mut longer = good.clone();
        longer.push(b'\n');
        refused(longer, "a byte more".into());
        disk.set(&path, good);
    }
    assert_eq!(newest(&disk), Some(2));
    println!("{flips} flips, {cuts} truncations");
    assert!(flips >= 8 * 7000, "{flips}");
    for tensor in ["h.0.weight", "counts", "m/h.0.weight", "ids"] {
        assert!(named.contains(tensor), "{tensor} is never blamed: {named:?}");
    }
}

#[test]
fn missing_files_and_swapped_ones_are_refused() {
    let disk = history(2);
    for path in files(&disk, 2) {
        let disk = disk.snapshot();
        disk.remove(&path).unwrap();
        let loaded = load_newest(&disk, Path::new(DIR)).unwrap().unwrap();
        assert_eq!((loaded.step, loaded.skipped.len()), (1, 1));
        assert!(loaded.skipped[0].to_string().contains(path.to_str().unwrap()));
    }
    // each file of step 1 is sound, but not in step 2
    for (ours, theirs) in files(&disk, 2).into_iter().zip(files(&disk, 1)) {
        let disk = disk.snapshot();
        disk.set(&ours, disk.get(&theirs));
        assert_eq!(load_newest(&disk, Path::new(DIR)).unwrap().unwrap().step, 1);
    }
    // a whole checkpoint under a wrong name
    let disk = history(1);
    disk.rename(&Path::new(DIR).join("step-1"), &Path::new(DIR).join("step-9")).unwrap();
    let error = load_newest(&disk, Path::new(DIR)).unwrap_err().to_string();
    assert_eq!(error, "/checkpoints/step-9/manifest.json: holds step 1, wanted 9");
}

/// None good is not the same as none: training must not start again from step 0 by itself.
#[test]
fn a_run_whose_checkpoints_are_all_bad_does_not_start_again() {
    let disk = history(1);
    let path = Path::new(DIR).join("step-1/model.safetensors");
    let mut bytes = disk.get(&path);
    *bytes.last_mut().unwrap() ^= 1;
    disk.set(&path, bytes);
    let error = load_newest(&disk, Path::new(DIR)).unwrap_err().to_string();
    assert!(
        error.starts_with(
            "/checkpoints/step-1/model.safetensors: tensor `h.0.weight` is corrupt: SHA-256 "
        ),
        "{error}"
    );
    assert!(load_newest(&MemDisk::new(), Path::new(DIR)).unwrap().is_none());
}

/// G7: each operation fails in each way, once or from then on.
#[test]
fn a_failing_disk_leaves_the_previous_checkpoint() {
    let kinds = [
        ErrorKind::StorageFull,
        ErrorKind::QuotaExceeded,
        ErrorKind::Other,
        ErrorKind::Interrupted,
        ErrorKind::ReadOnlyFilesystem,
    ];
    let once = kinds.iter().map(|k| Fault::Error(*k));
    let always = kinds.iter().filter(|k| **k != ErrorKind::Interrupted).map(|k| Fault::Always(*k));
    let before = history(3);
    let mut cases = 0;
    for fault in once.chain(always).chain([Fault::Short]) {
        for at in 1.. {
            let disk = before.snapshot();
            let started = disk.operations();
            disk.arm(at, fault);
            let result = put(&disk, 4);
            disk.disarm();
            if disk.operations() - started < at {
                assert!(at > 30, "only {at} operations");
                break;
            }
            cases += 1;
            let what = format!("{fault:?} at {at}");
            let harmless = matches!(fault, Fault::Short | Fault::Error(ErrorKind::Interrupted));
            assert!(result.is_ok() || !harmless, "{what}: {result:?}");
            // also after the next start on what is durable
            let nothing = vec![Fate::Lost; disk.waiting().len()];
            for disk in [disk.clone(), disk.after_crash(&nothing)] {
                clean(&disk, Path::new(DIR)).unwrap();
                assert!(!stray(&disk), "{what}");
                let got = newest(&disk);
                assert!(got == Some(4) || (got == Some(3) && result.is_err()), "{what}: {got:?}");
                put(&disk, got.unwrap() + 1).unwrap();
            }
        }
    }
    println!("{cases} disk faults");
}

#[test]
fn good_checkpoints_are_kept_and_rotten_ones_do_not_count() {
    let steps = |disk: &MemDisk| -> Vec<u64> {
        list(disk, Path::new(DIR)).unwrap().iter().map(|e| e.step).collect()
    };
    let disk = history(5);
    assert_eq!(steps(&disk), [5, 4]);
    disk.set(&Path::new(DIR).join("step-5/state.json"), b"{}".to_vec());
    put(&disk, 6).unwrap();
    assert_eq!(steps(&disk), [6, 5, 4], "4 is the second good one");
    put(&disk, 7).unwrap();
    assert_eq!(steps(&disk), [7, 6]);
    Run::at(8, 2).save(&disk, Path::new(DIR), 8, 3).unwrap();
    assert_eq!(steps(&disk), [8, 7, 6]);
    // even if asked for one
    Run::at(9, 2).save(&disk, Path::new(DIR), 9, 1).unwrap();
    assert_eq!(steps(&disk), [9, 8]);
}

#[test]
fn a_full_disk_is_noticed_before_the_first_byte() {
    let disk = history(1);
    disk.set_free(4096);
    let operations = disk.operations();
    let error = put(&disk, 2).unwrap_err();
    assert!(matches!(&error, Error::Io { source, .. } if source.kind() == ErrorKind::StorageFull));
    assert!(error.to_string().ends_with("bytes, the disk has 4096 left"), "{error}");
    assert!(disk.operations() - operations <= 1 && newest(&disk) == Some(1));
}

#[test]
fn wrong_tensors_are_refused() {
    let one = [1.0f32, 2.0];
    let disk = MemDisk::new();
    let save = |tensors: Vec<SavedTensor<'_>>| {
        save(&disk, Path::new(DIR), 1, 2, tensors, &json!({})).unwrap_err().to_string()
    };
    let tensor = |file, name| SavedTensor::new(file, name, &[2], &one);
    assert_eq!(
        save(vec![SavedTensor::new("model", "w", &[2, 2], &one)]),
        "checkpoint::save: `tensor` has shape [2], wanted [2, 2]"
    );
    assert_eq!(
        save(vec![tensor("model", "w"), tensor("model", "w")]),
        "checkpoint tensor `w` of `model`: got two, wanted one"
    );
    assert_eq!(
        save(vec![tensor("../model", "w")]),
        "name of a checkpoint file: got ../model, wanted letters, digits, `_` and `-`"
    );
    assert_eq!(disk.operations(), 0);
    put(&disk, 1).unwrap();
    let loaded = load_newest(&disk, Path::new(DIR)).unwrap().unwrap();
    let file = "/checkpoints/step-1/model.safetensors";
    let read = |name, len| loaded.read(&disk, "model", name, &mut vec![0.0f32; len]).unwrap_err();
    assert_eq!(read("v", 2).to_string(), format!("{file}: has no tensor `v`"));
    assert_eq!(
        read("h.0.weight", 2).to_string(),
        format!("{file}: tensor `h.0.weight` is F32 [6, 2], wanted F32 [2]")
    );
}

/// On the real disk; the files are what the `safetensors` crate reads.
#[test]
fn real_files_are_safetensors() {
    let dir = crate::support::temp_dir("checkpoint");
    let run = Run::at(3, 100);
    let at = dir.join("checkpoints");
    let saved = run.save(&Disk, &at, 3, 2).unwrap();
    run.save(&Disk, &at, 3, 2).unwrap();
    assert_eq!(std::fs::read_dir(&at).unwrap().count(), 1);
    assert_eq!(saved.path, at.join("step-3"));
    let loaded = load_newest(&Disk, &at).unwrap().unwrap();
    Run::check(&loaded, &Disk);
    let bytes = std::fs::read(saved.path.join("optimizer.safetensors")).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(read.len(), 4);
    let m = read.tensor("m/h.0.weight").unwrap();
    assert_eq!((m.shape(), m.dtype()), (&[100][..], safetensors::Dtype::F64));
    assert_eq!(m.data(), bytemuck::cast_slice::<_, u8>(&run.moments));
    let info = loaded.tensors().find(|t| t.name == "ids").unwrap();
    assert_eq!((info.file, info.dtype, info.shape), ("optimizer", Dtype::U64, &[][..]));
    let total: u64 =
        std::fs::read_dir(&saved.path).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).sum();
    assert_eq!(saved.bytes, total);
    assert!(Disk.free_space(&at).unwrap() > 0);
    assert!(Disk.create(&saved.path.join("state.json")).is_err(), "never over a file that exists");
}
