//! What the operating system says about disks and memory.

#![allow(unsafe_code)]

use std::{ffi::CString, io, mem::MaybeUninit, os::unix::ffi::OsStrExt, path::Path};

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

/// Bytes of memory that can be taken without hurting others, swap included, or fewer if the
/// container (a control group of version 2) has fewer; `None` where the system does not tell.
pub fn free_memory_bytes() -> Option<usize> {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    // The one hierarchy of version 2: `0::/path`.
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let groups = Path::new(own).ancestors().map(|dir| Path::new("/sys/fs/cgroup").join(dir));
    groups.filter_map(|dir| free_in_group(&dir)).chain(free_of_machine()).min()
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
    let cached: usize =
        ["inactive_file", "active_file", "slab_reclaimable"].map(cached).iter().sum();
    let used = number("memory.current")?.saturating_sub(cached);
    Some(number("memory.max")?.saturating_sub(used))
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
