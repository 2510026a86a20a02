//! Reads the float64 oracles under `tests/golden`, which `gen_fixtures.py`, `gen_more.py`,
//! `gen_policy.py` and `gen_preference.py` there made from Hugging Face transformers and TRL.

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashMap},
    path::PathBuf,
};

use safetensors::{Dtype, SafeTensors};

/// `tests/golden/NAME`.
pub fn path(name: &str) -> PathBuf {
    super::root().join("tests/golden").join(name)
}

/// One safetensors file, all of its numbers widened to f64. It remembers which tensors were read.
pub struct Golden {
    file: String,
    tensors: HashMap<String, (Vec<usize>, Vec<f64>)>,
    read: RefCell<BTreeSet<String>>,
}

impl Golden {
    /// Opens `tests/golden/NAME`, for example `pure/gae.safetensors`.
    pub fn open(name: &str) -> Self {
        let bytes = std::fs::read(path(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file
            .tensors()
            .into_iter()
            .map(|(key, t)| {
                let d = t.data();
                let x: Vec<f64> = match t.dtype() {
                    Dtype::F64 => words(d).map(f64::from_le_bytes).collect(),
                    Dtype::F32 => words(d).map(|b| f64::from(f32::from_le_bytes(b))).collect(),
                    Dtype::I64 => words(d).map(|b| i64::from_le_bytes(b) as f64).collect(),
                    Dtype::U8 => d.iter().map(|b| f64::from(*b)).collect(),
                    other => panic!("{name}: {key} is {other:?}"),
                };
                // Text models inside others have their names there.
                (key.replace("language_model.", ""), (t.shape().to_vec(), x))
            })
            .collect();
        Self { file: name.into(), tensors, read: RefCell::default() }
    }

    pub fn has(&self, key: &str) -> bool {
        self.tensors.contains_key(key)
    }

    /// The numbers of a tensor.
    #[track_caller]
    pub fn get(&self, key: &str) -> &[f64] {
        self.read.borrow_mut().insert(key.into());
        &self.entry(key).1
    }

    /// Its shape.
    #[track_caller]
    pub fn shape(&self, key: &str) -> &[usize] {
        &self.entry(key).0
    }

    /// A scalar.
    #[track_caller]
    pub fn scalar(&self, key: &str) -> f64 {
        let x = self.get(key);
        assert_eq!(x.len(), 1, "{}: {key} is no scalar", self.file);
        x[0]
    }

    /// Numbers that are integers: ids, lengths, masks.
    #[track_caller]
    pub fn ints(&self, key: &str) -> Vec<i64> {
        self.get(key).iter().map(|x| *x as i64).collect()
    }

    /// The cells of a padded tensor that `mask` keeps, back to back.
    #[track_caller]
    pub fn kept(&self, key: &str, mask: &[bool]) -> Vec<f64> {
        let x = self.get(key);
        assert_eq!(x.len(), mask.len(), "{}: {key} and its mask", self.file);
        x.iter().zip(mask).filter(|x| *x.1).map(|x| *x.0).collect()
    }

    /// Panics if a tensor was never read, so that none is skipped by mistake. `except` are prefixes
    /// of those that nothing computes yet; one that excuses no tensor is out of date.
    #[track_caller]
    pub fn all_read(&self, except: &[&str]) {
        let mut unread: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        unread.retain(|key| !self.read.borrow().contains(*key));
        for prefix in except {
            let some = unread.iter().any(|key| key.starts_with(prefix));
            assert!(some, "{}: nothing unread starts with {prefix}", self.file);
        }
        unread.retain(|key| !except.iter().any(|prefix| key.starts_with(prefix)));
        unread.sort_unstable();
        assert!(unread.is_empty(), "{}: never read: {unread:?}", self.file);
    }

    /// All keys that start with `prefix`, without it, sorted.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let mut keys: Vec<String> =
            self.tensors.keys().filter_map(|k| Some(k.strip_prefix(prefix)?.to_owned())).collect();
        keys.sort();
        keys
    }

    #[track_caller]
    fn entry(&self, key: &str) -> &(Vec<usize>, Vec<f64>) {
        self.tensors.get(key).unwrap_or_else(|| panic!("{} has no {key}", self.file))
    }
}

fn words<const N: usize>(d: &[u8]) -> impl Iterator<Item = [u8; N]> {
    d.chunks_exact(N).map(|c| c.try_into().unwrap())
}
