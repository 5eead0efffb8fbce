//! Compiles the protocols that are spoken here, without `protoc`: the agent's, which is served and asked with tonic, and
//! the inference servers', whose messages travel over our own transport.

use std::{error::Error, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    compile("forebay/telemetry/v1/telemetry.proto", true)?;
    compile("kserve/inference.proto", false)
}

fn compile(file: &str, service: bool) -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto");
    let file = root.join(file);
    println!("cargo:rerun-if-changed={}", file.display());
    let descriptors = protox::compile([file], [root])?;
    tonic_prost_build::configure().build_client(service).build_server(service).compile_fds(descriptors)?;
    Ok(())
}
