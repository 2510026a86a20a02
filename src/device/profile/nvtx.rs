//! Names for NVIDIA's profilers, where their library is installed (`libnvToolsExt`, which CUDA 13
//! has no more).

#![allow(unsafe_code)]

use std::ffi::CString;

use cudarc::nvtx::sys;

/// Whether the library is there: without it the calls below would panic.
pub(super) fn is_there() -> bool {
    // SAFETY: looks for the library and opens it.
    unsafe { sys::is_culib_present() }
}

/// Begins a range of this thread, inside of those that it is in.
pub(super) fn push(name: &str) {
    let name = CString::new(name).unwrap_or_default();
    // SAFETY: the library is there and copies the name.
    unsafe { sys::nvtxRangePushA(name.as_ptr()) };
}

/// Ends the newest range of this thread.
pub(super) fn pop() {
    // SAFETY: the library is there.
    unsafe { sys::nvtxRangePop() };
}
