//! What the operating system says about disks and memory.

#![allow(unsafe_code)]

use std::{
    ffi::CString,
    io,
    mem::MaybeUninit,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use crate::error::{Error, Result};

/// Bytes that an ordinary user may still write to the file system that holds `path`.
pub fn free_disk_bytes(path: &Path) -> io::Result<u64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut stat = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` ends in NUL and `stat` is writable; both live through the call.
    let rc = unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `statvfs` returned 0, so it filled `stat`.
    let stat = unsafe { stat.assume_init() };
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Kills all processes of the group that a child leads, or led.
pub fn kill_group(leader: u32) {
    if let Ok(group @ 2..) = libc::pid_t::try_from(leader) {
        // SAFETY: the call takes numbers alone; a group that is gone is an error that is ignored.
        unsafe { libc::killpg(group, libc::SIGKILL) };
    }
}

/// An empty vector with room for `len` elements: out of memory is an error, not the end of the
/// process. `what` names them.
pub fn reserve<T>(what: &'static str, len: usize) -> Result<Vec<T>> {
    let mut all = Vec::new();
    let free = || free_memory_bytes().unwrap_or(0);
    all.try_reserve_exact(len).map_err(|_| Error::Memory {
        what,
        want: len.saturating_mul(size_of::<T>()),
        have: free(),
    })?;
    Ok(all)
}

/// Bytes of memory that can be taken without hurting others, swap included, or fewer if the
/// container (a control group) has fewer; `None` where the system does not tell.
pub fn free_memory_bytes() -> Option<usize> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let lines = || groups.lines().filter_map(|line| line.split_once(':')?.1.split_once(":/"));
    let above = |root: &'static str, own: &str| -> Vec<PathBuf> {
        Path::new(own).ancestors().map(|dir| Path::new(root).join(dir)).collect()
    };
    // The one hierarchy of version 2 has no name, that of version 1 is named by what it limits.
    let unified = lines().find(|(of, _)| of.is_empty()).map_or("", |(_, own)| own);
    let memory = lines().find(|(of, _)| of.split(',').any(|c| c == "memory"));
    let unified = above("/sys/fs/cgroup", unified);
    let memory = memory.map(|(_, own)| above("/sys/fs/cgroup/memory", own)).unwrap_or_default();
    let groups = unified.iter().chain(&memory);
    groups.filter_map(|dir| free_in_group(dir)).chain(free_of_machine()).min()
}

/// Bytes that are left to the processes of a control group that has a limit. Cached files give way.
pub fn free_in_group(dir: &Path) -> Option<usize> {
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<usize>().ok();
    let stat = read("memory.stat").unwrap_or_default();
    let cached = |key: &str| -> usize {
        let line = stat.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' '));
        line.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
    };
    // Of version 2, then of version 1, which has no number for none.
    for (current, max, gives_way) in [
        ("memory.current", "memory.max", ["inactive_file", "active_file", "slab_reclaimable"]),
        (
            "memory.usage_in_bytes",
            "memory.limit_in_bytes",
            ["total_inactive_file", "total_active_file", ""],
        ),
    ] {
        let cached: usize = gives_way.map(cached).iter().sum();
        if let (Some(used), Some(most)) = (number(current), number(max)) {
            return Some(most.saturating_sub(used.saturating_sub(cached)));
        }
    }
    None
}

fn free_of_machine() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |key: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()
    };
    let all = kib("MemAvailable")?.saturating_add(kib("SwapFree").unwrap_or(0));
    Some(all.saturating_mul(1024))
}
