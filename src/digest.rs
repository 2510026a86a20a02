//! SHA-256 as files and messages write it.

use std::io::{self, Read};

use sha2::{Digest, Sha256};

/// Two digits a byte.
pub fn hex(hash: impl AsRef<[u8]>) -> String {
    hash.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

/// SHA-256 of all that a reader has, and how many bytes it is.
pub fn sha256(mut from: impl Read) -> io::Result<([u8; 32], u64)> {
    let (mut hash, mut buffer, mut count) = (Sha256::new(), vec![0; 1 << 18], 0);
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok((hash.finalize().into(), count)),
            Ok(n) => {
                hash.update(&buffer[..n]);
                count += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}
