//! A disk in memory that loses what was not synced, and fails when told to.
//!
//! Names and bytes live in two worlds: what the process sees, and what is on the platter. Between
//! them waits a list of effects. A crash lets any subset of them through, writes possibly in part;
//! `sync` and `sync_dir` let through those of their file or folder.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    io::{self, Cursor, ErrorKind},
    path::{Component, Path},
    rc::Rc,
};

use warpo::storage::{ReadSeek, Storage, StorageFile};

type Id = usize;

#[derive(Clone, Debug)]
enum Node {
    File(Vec<u8>),
    Dir(BTreeMap<String, Id>),
}

#[derive(Clone, Debug)]
enum Effect {
    /// `dir[name] = id`, after `from` was taken away (a rename).
    Link {
        dir: Id,
        name: String,
        id: Id,
        from: Option<String>,
    },
    Unlink {
        dir: Id,
        name: String,
    },
    Write {
        file: Id,
        at: usize,
        bytes: Vec<u8>,
    },
    Cut {
        file: Id,
        len: usize,
    },
}

/// What an operation does instead of its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Power is lost before it.
    Crash,
    /// An error; writes first take half of their bytes.
    Error(ErrorKind),
    /// An error, and again at every later operation.
    Always(ErrorKind),
    /// A write takes one byte; other operations work.
    Short,
}

/// Which part of a waiting effect survives a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    Lost,
    Kept,
    /// Of a write: this many bytes.
    Torn(usize),
    /// Of a write: its length, but zeros for bytes.
    Zeros,
}

#[derive(Clone, Debug)]
struct State {
    seen: Vec<Node>,
    durable: Vec<Node>,
    waiting: Vec<Effect>,
    count: usize,
    fault: Option<(usize, Fault)>,
    crashed: bool,
    free: Option<u64>,
}

/// The disk; clones share it.
#[derive(Clone, Debug)]
pub struct MemDisk(Rc<RefCell<State>>);

fn error(kind: ErrorKind) -> io::Error {
    kind.into()
}

impl State {
    fn find(&self, path: &Path) -> io::Result<Id> {
        let mut id = 0;
        for part in path.components() {
            let Component::Normal(name) = part else { continue };
            let Node::Dir(names) = &self.seen[id] else {
                return Err(error(ErrorKind::NotADirectory));
            };
            id = *names.get(name.to_str().unwrap()).ok_or(error(ErrorKind::NotFound))?;
        }
        Ok(id)
    }

    fn split(&self, path: &Path) -> io::Result<(Id, String)> {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        Ok((self.find(path.parent().unwrap())?, name))
    }

    fn names(&mut self, dir: Id) -> &mut BTreeMap<String, Id> {
        let Node::Dir(names) = &mut self.seen[dir] else { panic!("not a folder") };
        names
    }

    /// Counts an operation; the fault to take instead of it, if it is its turn.
    fn turn(&mut self) -> io::Result<Option<Fault>> {
        if self.crashed {
            return Err(io::Error::other("the machine is off"));
        }
        self.count += 1;
        match self.fault {
            Some((at, Fault::Crash)) if self.count == at => {
                self.crashed = true;
                Err(io::Error::other("the machine is off"))
            }
            Some((at, fault @ Fault::Always(_))) if self.count >= at => Ok(Some(fault)),
            Some((at, fault)) if self.count == at => Ok(Some(fault)),
            _ => Ok(None),
        }
    }

    /// As `turn`, for all but writes.
    fn step(&mut self) -> io::Result<()> {
        match self.turn()? {
            Some(Fault::Error(kind) | Fault::Always(kind)) => Err(error(kind)),
            _ => Ok(()),
        }
    }

    fn add(&mut self, node: Node) -> Id {
        let empty = match node {
            Node::File(_) => Node::File(Vec::new()),
            Node::Dir(_) => Node::Dir(BTreeMap::new()),
        };
        self.seen.push(node);
        self.durable.push(empty);
        self.seen.len() - 1
    }

    fn link(&mut self, dir: Id, name: String, id: Id, from: Option<String>) {
        let names = self.names(dir);
        if let Some(from) = &from {
            names.remove(from);
        }
        names.insert(name.clone(), id);
        self.waiting.push(Effect::Link { dir, name, id, from });
    }

    fn land(&mut self, effect: &Effect, fate: Fate) {
        match effect {
            Effect::Link { dir, name, id, from } => {
                let Node::Dir(names) = &mut self.durable[*dir] else { panic!() };
                if let Some(from) = from {
                    names.remove(from);
                }
                names.insert(name.clone(), *id);
            }
            Effect::Unlink { dir, name } => {
                let Node::Dir(names) = &mut self.durable[*dir] else { panic!() };
                names.remove(name);
            }
            Effect::Write { file, at, bytes } => {
                let Node::File(data) = &mut self.durable[*file] else { panic!() };
                let bytes = match fate {
                    Fate::Torn(n) => bytes[..n.min(bytes.len())].to_vec(),
                    Fate::Zeros => vec![0; bytes.len()],
                    _ => bytes.clone(),
                };
                data.resize(data.len().max(at + bytes.len()), 0);
                data[*at..at + bytes.len()].copy_from_slice(&bytes);
            }
            Effect::Cut { file, len } => {
                let Node::File(data) = &mut self.durable[*file] else { panic!() };
                data.truncate(*len);
            }
        }
    }

    fn sync(&mut self, wanted: impl Fn(&Effect) -> bool) {
        let waiting = std::mem::take(&mut self.waiting);
        for effect in waiting {
            if wanted(&effect) {
                self.land(&effect, Fate::Kept);
            } else {
                self.waiting.push(effect);
            }
        }
    }
}

impl MemDisk {
    /// An empty disk.
    pub fn new() -> Self {
        let root = vec![Node::Dir(BTreeMap::new())];
        Self(Rc::new(RefCell::new(State {
            seen: root.clone(),
            durable: root,
            waiting: Vec::new(),
            count: 0,
            fault: None,
            crashed: false,
            free: None,
        })))
    }

    /// A copy that shares nothing.
    pub fn snapshot(&self) -> Self {
        Self(Rc::new(RefCell::new(self.0.borrow().clone())))
    }

    /// Arms a fault at the `at`-th operation from now, counted from 1.
    pub fn arm(&self, at: usize, fault: Fault) {
        let mut s = self.0.borrow_mut();
        s.fault = Some((s.count + at, fault));
    }

    /// Works again.
    pub fn disarm(&self) {
        self.0.borrow_mut().fault = None;
    }

    /// Operations so far.
    pub fn operations(&self) -> usize {
        self.0.borrow().count
    }

    /// Sets the answer of `free_space`.
    pub fn set_free(&self, bytes: u64) {
        self.0.borrow_mut().free = Some(bytes);
    }

    /// Effects that a crash may lose: the bytes of each write, `None` for names.
    pub fn waiting(&self) -> Vec<Option<usize>> {
        let bytes = |e: &Effect| match e {
            Effect::Write { bytes, .. } => Some(bytes.len()),
            _ => None,
        };
        self.0.borrow().waiting.iter().map(bytes).collect()
    }

    /// The disk after power came back.
    pub fn after_crash(&self, fates: &[Fate]) -> Self {
        let disk = self.snapshot();
        {
            let mut s = disk.0.borrow_mut();
            let waiting = std::mem::take(&mut s.waiting);
            for (effect, fate) in waiting.iter().zip(fates) {
                if *fate != Fate::Lost {
                    s.land(effect, *fate);
                }
            }
            s.seen = s.durable.clone();
            (s.fault, s.crashed) = (None, false);
        }
        disk
    }

    /// Replaces the bytes of a file, durably, without counting.
    pub fn set(&self, path: &Path, bytes: Vec<u8>) {
        let mut s = self.0.borrow_mut();
        let id = s.find(path).unwrap();
        s.seen[id] = Node::File(bytes);
    }

    /// The bytes of a file, without counting.
    pub fn get(&self, path: &Path) -> Vec<u8> {
        let s = self.0.borrow();
        let Node::File(bytes) = &s.seen[s.find(path).unwrap()] else { panic!("{path:?}") };
        bytes.clone()
    }
}

struct Handle(MemDisk, Id);

impl StorageFile for Handle {
    fn append(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut s = self.0.0.borrow_mut();
        let (n, result) = match s.turn()? {
            Some(Fault::Error(ErrorKind::Interrupted)) => {
                return Err(error(ErrorKind::Interrupted));
            }
            Some(Fault::Error(kind) | Fault::Always(kind)) => (bytes.len() / 2, Err(error(kind))),
            Some(Fault::Short) => (bytes.len().min(1), Ok(bytes.len().min(1))),
            _ => (bytes.len(), Ok(bytes.len())),
        };
        let Node::File(data) = &mut s.seen[self.1] else { panic!() };
        let at = data.len();
        data.extend_from_slice(&bytes[..n]);
        s.waiting.push(Effect::Write { file: self.1, at, bytes: bytes[..n].to_vec() });
        result
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut s = self.0.0.borrow_mut();
        s.step()?;
        let own = |e: &Effect| match e {
            Effect::Write { file, .. } | Effect::Cut { file, .. } => *file == self.1,
            _ => false,
        };
        s.sync(own);
        Ok(())
    }
}

impl Storage for MemDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut s = self.0.borrow_mut();
        s.step()?;
        let (dir, name) = s.split(path)?;
        if s.names(dir).contains_key(&name) {
            return Err(error(ErrorKind::AlreadyExists));
        }
        let id = s.add(Node::Dir(BTreeMap::new()));
        s.link(dir, name, id, None);
        Ok(())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        let mut s = self.0.borrow_mut();
        s.step()?;
        let (dir, name) = s.split(path)?;
        if s.names(dir).contains_key(&name) {
            return Err(error(ErrorKind::AlreadyExists));
        }
        let id = s.add(Node::File(Vec::new()));
        s.link(dir, name, id, None);
        Ok(Box::new(Handle(self.clone(), id)))
    }

    fn append_after(&self, path: &Path, len: u64) -> io::Result<Box<dyn StorageFile>> {
        let found = self.0.borrow().find(path);
        if found.is_err() {
            return self.create(path);
        }
        let (mut s, file, len) = (self.0.borrow_mut(), found?, len as usize);
        s.step()?;
        let Node::File(data) = &mut s.seen[file] else {
            return Err(error(ErrorKind::IsADirectory));
        };
        data.truncate(len);
        s.waiting.push(Effect::Cut { file, len });
        drop(s);
        Ok(Box::new(Handle(self.clone(), file)))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut s = self.0.borrow_mut();
        s.step()?;
        let id = s.find(path)?;
        s.sync(|e| match e {
            Effect::Link { dir, .. } | Effect::Unlink { dir, .. } => *dir == id,
            Effect::Write { .. } | Effect::Cut { .. } => false,
        });
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut s = self.0.borrow_mut();
        s.step()?;
        let (dir, from) = s.split(from)?;
        let (to_dir, name) = s.split(to)?;
        assert_eq!(dir, to_dir, "renames stay in their folder");
        let id = *s.names(dir).get(&from).ok_or(error(ErrorKind::NotFound))?;
        let there = s.names(dir).get(&name).copied();
        if there.is_some_and(|there| matches!(s.seen[there], Node::Dir(_))) {
            return Err(error(ErrorKind::DirectoryNotEmpty));
        }
        s.link(dir, name, id, Some(from));
        Ok(())
    }

    /// File by file, as the real one: a crash may leave half of a folder.
    fn remove(&self, path: &Path) -> io::Result<()> {
        let inside = {
            let s = self.0.borrow();
            match &s.seen[s.find(path)?] {
                Node::Dir(names) => names.keys().cloned().collect(),
                Node::File(_) => Vec::new(),
            }
        };
        for name in inside {
            self.remove(&path.join(name))?;
        }
        let mut s = self.0.borrow_mut();
        s.step()?;
        let (dir, name) = s.split(path)?;
        s.names(dir).remove(&name);
        s.waiting.push(Effect::Unlink { dir, name });
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut s = self.0.borrow_mut();
        s.step()?;
        let id = s.find(path)?;
        match &s.seen[id] {
            Node::Dir(names) => Ok(names.keys().cloned().collect()),
            Node::File(_) => Err(error(ErrorKind::NotADirectory)),
        }
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadSeek>> {
        let mut s = self.0.borrow_mut();
        s.step()?;
        let id = s.find(path)?;
        match &s.seen[id] {
            Node::File(bytes) => Ok(Box::new(Cursor::new(bytes.clone()))),
            Node::Dir(_) => Err(error(ErrorKind::IsADirectory)),
        }
    }

    fn free_space(&self, _: &Path) -> Option<u64> {
        self.0.borrow().free
    }
}
