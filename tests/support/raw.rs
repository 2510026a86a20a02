//! Launches kernels of `kernels/sim`, which are no part of the product and have no Rust function,
//! on a simulator or on a GPU.

#![allow(unsafe_code, clippy::multiple_unsafe_ops_per_block)]

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    path::Path,
};

use cudarc::driver::{result, sys};

use super::sim::{Order, Sim, Variant};

/// A kernel that takes a pointer to an output, then `Arg`s.
pub struct Kernel<'a> {
    /// For a GPU: the file that it is in, compiled.
    pub image: &'static [u8],
    pub name: &'a str,
    pub threads: u32,
    pub blocks: u32,
    /// They may wait for each other.
    pub together: bool,
    /// Bytes of shared memory.
    pub shared: usize,
    /// Of threads and blocks on the simulator.
    pub order: Order,
}

/// An argument after the output.
#[derive(Clone, Copy)]
pub enum Arg<'a> {
    /// A pointer to these bytes.
    Bytes(&'a [u8]),
    Int(c_int),
    /// A map of these bytes.
    Map(&'a [u8], Boxes),
    /// A map of the output.
    OfOutput(Boxes),
}

/// How TMA copies a tensor of bf16, of two dimensions or three: a `TENSOR_MAP`. Columns come first.
#[derive(Clone, Copy, Debug)]
pub struct Boxes {
    pub rank: u32,
    pub dims: [u64; 3],
    /// Elements from row to row, and from plane to plane.
    pub strides: [u64; 2],
    pub size: [u32; 3],
    /// Bytes, 0 for none.
    pub swizzle: u32,
}

/// What a launch gets: a pointer, a number or a tensor map.
#[repr(C, align(64))]
struct Value([u64; 16]);

impl Value {
    fn of(word: u64) -> Self {
        let mut all = [0; 16];
        all[0] = word;
        Self(all)
    }
}

impl Boxes {
    /// Of a matrix.
    pub fn matrix(
        [cols, rows]: [u64; 2],
        stride: u64,
        [wide, tall]: [u32; 2],
        swizzle: u32,
    ) -> Self {
        let (dims, strides, size) = ([cols, rows, 1], [stride, 0], [wide, tall, 1]);
        Self { rank: 2, dims, strides, size, swizzle }
    }

    /// As `sim.h` has it.
    fn simulated(self, base: u64) -> Value {
        let two = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let mut all = [0; 16];
        all[0] = base;
        let ([cols, rows, planes], [wide, tall, deep]) = (self.dims, self.size);
        all[1] = two(2, self.rank);
        all[2..6].copy_from_slice(&[cols, rows, planes, 1]);
        all[6..9].copy_from_slice(&[2, 2 * self.strides[0], 2 * self.strides[1]]);
        all[10..13].copy_from_slice(&[two(wide, tall), two(deep, 1), self.swizzle.into()]);
        Value(all)
    }

    unsafe fn on_gpu(self, base: u64) -> Result<Value, result::DriverError> {
        use sys::CUtensorMapSwizzle_enum as Swizzle;
        let swizzle = match self.swizzle {
            0 => Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            _ => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: every array is as long as the tensor has dimensions, or longer; the strides' one
        // less.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                self.rank,
                base as *mut c_void,
                self.dims.as_ptr(),
                self.strides.map(|n| 2 * n).as_ptr(),
                self.size.as_ptr(),
                [1; 3].as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_NONE,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()?;
        Ok(Value(map.opaque))
    }
}

impl Kernel<'_> {
    /// Runs it; the output is not written before. Or why it was stopped.
    pub fn run(&self, sim: &Sim, out: &mut [u8], args: &[Arg<'_>]) -> Result<(), String> {
        // SAFETY: the kernels of the files take what the callers say; the tests give buffers that
        // are at least as large as the kernels expect, or seed a mistake on purpose.
        unsafe {
            match sim.variant {
                Variant::Gpu => self.on_gpu(out, args).map_err(|e| format!("{e:?}")),
                _ => self.simulated(sim.library(), out, args),
            }
        }
    }

    unsafe fn simulated(
        &self,
        library: &Path,
        out: &mut [u8],
        args: &[Arg<'_>],
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
            let mut values = vec![Value::of(device[0] as u64)];
            for arg in args {
                if let Arg::Bytes(x) | Arg::Map(x, _) = arg {
                    device.push(alloc(x.len()));
                    device[device.len() - 1].copy_from_nonoverlapping(x.as_ptr(), x.len());
                }
                let last = device[device.len() - 1] as u64;
                values.push(match *arg {
                    Arg::Bytes(_) => Value::of(last),
                    Arg::Int(x) => Value::of(u64::from(x.cast_unsigned())),
                    Arg::Map(_, boxes) => boxes.simulated(last),
                    Arg::OfOutput(boxes) => boxes.simulated(device[0] as u64),
                });
            }
            let mut values: Vec<*mut c_void> =
                values.iter_mut().map(|v| (&raw mut *v).cast()).collect();
            let name = CString::new(self.name).unwrap();
            let (blocks, threads) = ([self.blocks, 1, 1], [self.threads, 1, 1]);
            let run = library.get::<Run>("sim_launch").unwrap();
            let (blocks, threads) = (blocks.as_ptr(), threads.as_ptr());
            let (values, order) = (values.as_mut_ptr(), self.order);
            let (one, two, together) = (order.threads, order.blocks, self.together.into());
            if run(name.as_ptr(), blocks, threads, self.shared, values, one, two, together) != 0 {
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

    unsafe fn on_gpu(&self, out: &mut [u8], args: &[Arg<'_>]) -> Result<(), result::DriverError> {
        // SAFETY: handles are used in the context that made them; the rest is the caller's promise.
        unsafe {
            result::init()?;
            let context = result::primary_ctx::retain(result::device::get(0)?)?;
            result::ctx::set_current(context)?;
            let module = result::module::load_data(self.image.as_ptr().cast())?;
            let f = result::module::get_function(module, CString::new(self.name).unwrap())?;
            let most =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            result::function::set_function_attribute(f, most, self.shared as c_int)?;
            let mut device: Vec<sys::CUdeviceptr> = vec![result::malloc_sync(out.len())?];
            let mut values = vec![Value::of(device[0])];
            for arg in args {
                if let Arg::Bytes(x) | Arg::Map(x, _) = arg {
                    device.push(result::malloc_sync(x.len())?);
                    result::memcpy_htod_sync(device[device.len() - 1], x)?;
                }
                let last = device[device.len() - 1];
                values.push(match *arg {
                    Arg::Bytes(_) => Value::of(last),
                    Arg::Int(x) => Value::of(u64::from(x.cast_unsigned())),
                    Arg::Map(_, boxes) => boxes.on_gpu(last)?,
                    Arg::OfOutput(boxes) => boxes.on_gpu(device[0])?,
                });
            }
            let mut values: Vec<*mut c_void> =
                values.iter_mut().map(|v| (&raw mut *v).cast()).collect();
            let (blocks, threads) = ((self.blocks, 1, 1), (self.threads, 1, 1));
            let stream = std::ptr::null_mut();
            let start = match self.together {
                true => result::launch_cooperative_kernel,
                false => result::launch_kernel,
            };
            start(f, blocks, threads, self.shared as u32, stream, &mut values)?;
            result::memcpy_dtoh_sync(out, device[0])?;
            for d in device {
                result::free_sync(d)?;
            }
        }
        Ok(())
    }
}
