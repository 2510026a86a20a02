//! Launches kernels of `kernels/sim`, which are no part of the product and have no Rust function, on a simulator
//! or on a GPU.

#![allow(unsafe_code, clippy::multiple_unsafe_ops_per_block)]

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    path::Path,
};

use cudarc::driver::{result, sys};

use super::sim::{Sim, Variant};

/// A kernel that takes pointers to an output and to inputs, then an int.
pub struct Kernel<'a> {
    /// For a GPU: the file that it is in, compiled.
    pub image: &'static [u8],
    pub name: &'a str,
    pub threads: u32,
    pub blocks: u32,
    /// Bytes of shared memory.
    pub shared: usize,
}

impl Kernel<'_> {
    /// Runs it; the output is not written before. Or why it was stopped.
    pub fn run(
        &self,
        sim: &Sim,
        out: &mut [u8],
        inputs: &[&[u8]],
        last: c_int,
    ) -> Result<(), String> {
        // SAFETY: the kernels of the two files take what the struct says; the tests give buffers that are at
        // least as large as the kernels expect, or seed a mistake on purpose.
        unsafe {
            match sim.variant {
                Variant::Gpu => self.on_gpu(out, inputs, last).map_err(|e| format!("{e:?}")),
                _ => self.simulated(sim.library(), out, inputs, last),
            }
        }
    }

    unsafe fn simulated(
        &self,
        library: &Path,
        out: &mut [u8],
        inputs: &[&[u8]],
        mut last: c_int,
    ) -> Result<(), String> {
        type Alloc = unsafe extern "C" fn(usize) -> *mut u8;
        type Free = unsafe extern "C" fn(*mut u8) -> c_int;
        type Text = unsafe extern "C" fn() -> *const c_char;
        type Run = unsafe extern "C" fn(
            *const c_char,
            *const u32,
            *const u32,
            usize,
            *mut *mut c_void,
            u64,
            u64,
            c_int,
        ) -> c_int;
        // SAFETY: the symbols of sim.cpp have the types above; the rest is the caller's promise.
        unsafe {
            let library = libloading::Library::new(library).unwrap();
            let alloc = library.get::<Alloc>("sim_alloc").unwrap();
            let mut device = vec![alloc(out.len())];
            for x in inputs {
                device.push(alloc(x.len()));
                device[device.len() - 1].copy_from_nonoverlapping(x.as_ptr(), x.len());
            }
            let mut args: Vec<*mut c_void> =
                device.iter_mut().map(|d| (&raw mut *d).cast()).collect();
            args.push((&raw mut last).cast());
            let name = CString::new(self.name).unwrap();
            let (blocks, threads) = ([self.blocks, 1, 1], [self.threads, 1, 1]);
            let run = library.get::<Run>("sim_launch").unwrap();
            let (blocks, threads) = (blocks.as_ptr(), threads.as_ptr());
            let args = args.as_mut_ptr();
            if run(name.as_ptr(), blocks, threads, self.shared, args, 0, 0, 0) != 0 {
                let text = library.get::<Text>("sim_error").unwrap()();
                return Err(CStr::from_ptr(text).to_str().unwrap().to_owned());
            }
            device[0].copy_to_nonoverlapping(out.as_mut_ptr(), out.len());
            let free = library.get::<Free>("sim_free").unwrap();
            for d in device {
                assert_eq!(free(d), 0, "device memory was written outside its bounds");
            }
        }
        Ok(())
    }

    unsafe fn on_gpu(
        &self,
        out: &mut [u8],
        inputs: &[&[u8]],
        mut last: c_int,
    ) -> Result<(), result::DriverError> {
        // SAFETY: handles are used in the context that made them; the rest is the caller's promise.
        unsafe {
            result::init()?;
            let context = result::primary_ctx::retain(result::device::get(0)?)?;
            result::ctx::set_current(context)?;
            let module = result::module::load_data(self.image.as_ptr().cast())?;
            let f = result::module::get_function(module, CString::new(self.name).unwrap())?;
            let mut device: Vec<sys::CUdeviceptr> = vec![result::malloc_sync(out.len())?];
            for x in inputs {
                device.push(result::malloc_sync(x.len())?);
                result::memcpy_htod_sync(device[device.len() - 1], x)?;
            }
            let mut args: Vec<*mut c_void> =
                device.iter_mut().map(|d| (&raw mut *d).cast()).collect();
            args.push((&raw mut last).cast());
            let (blocks, threads) = ((self.blocks, 1, 1), (self.threads, 1, 1));
            let stream = std::ptr::null_mut();
            result::launch_kernel(f, blocks, threads, self.shared as u32, stream, &mut args)?;
            result::memcpy_dtoh_sync(out, device[0])?;
            for d in device {
                result::free_sync(d)?;
            }
        }
        Ok(())
    }
}
