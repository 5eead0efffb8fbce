//! Variables and flags in place of the file.

use std::path::Path;

use super::*;

#[test]
fn environment_and_flags_override_the_file() {
    let flag = |value: &str| Flag { name: "--listen", key: "listen", value: value.to_owned() };
    let text = format!("[server]\nlisten = '127.0.0.1:1'\ndata_dir = 'file'\ndrain_seconds = 1\n{MODEL}");
    let mut reader = reader([
        ("FOREBAY__SERVER__LISTEN", "127.0.0.1:2"),
        ("FOREBAY__SERVER__DRAIN_SECONDS", "1_0"),
        ("FOREBAY__SERVER__ACCESS_LOG", "false"),
        ("FOREBAY_DATA_DIR", "variable"),
        ("FOREBAY_PORT", "tcp://10.0.0.1:80"),
        ("FOREBAY_SERVICE_HOST", "10.0.0.1"),
    ]);
    let server = reader.text("f.toml", &text).unwrap().server;
    assert_eq!((server.listen.port(), server.drain.as_secs(), server.access_log), (2, 10, false));
    assert_eq!(server.data_dir, Path::new("variable"));
    reader.flags.push(flag("127.0.0.1:3"));
    assert_eq!(reader.text("f.toml", &text).unwrap().server.listen.port(), 3);
    reader.flags.push(flag("0.0.0.0:3"));
    check_with(
        &reader,
        &text,
        &[
            "--listen: server.listen is \"0.0.0.0:3\": must be a loopback address such as 127.0.0.1 while callers are not authenticated (or set server.allow_unauthenticated = true)",
        ],
    );
}

#[test]
fn mistakes_in_the_environment() {
    let reader = reader([
        ("FOREBAY__SERVER__LISEN", "x"),
        ("FOREBAY__SERVER__DRAIN_SECONDS", "soon"),
        ("FOREBAY__MODEL__0__NAME", "x"),
    ]);
    // The file's own value is checked although the flag wins.
    let flags = vec![Flag { name: "--ops-listen", key: "ops_listen", value: "127.0.0.1:9".to_owned() }];
    check_with(
        &Reader { flags, ..reader },
        &format!("server.ops_listen = 'x'\n{MODEL}"),
        &[
            "f.toml:1:21: server.ops_listen is \"x\": must be an IP address and a port, as in \"127.0.0.1:7070\" or \"[::1]:7070\"",
            "FOREBAY__MODEL__0__NAME: model.0.name is not for the environment: write it in the config file (variables give the keys of one table, `FOREBAY__SERVER__…`)",
            "FOREBAY__SERVER__DRAIN_SECONDS: server.drain_seconds is \"soon\": must be a whole number from 0 to 86400 (omit the key for the default 30)",
            "FOREBAY__SERVER__LISEN: server.lisen is not a known key: did you mean `listen`?",
        ],
    );
}

#[test]
fn a_variable_that_is_no_text() {
    use std::os::unix::ffi::OsStringExt as _;
    let value = std::ffi::OsString::from_vec(vec![0xff]);
    let environment = [("FOREBAY_DATA_DIR", value)].into_iter().collect();
    check_with(
        &Reader { environment, ..reader([]) },
        MODEL,
        &["FOREBAY_DATA_DIR: server.data_dir is not UTF-8: must be readable text"],
    );
}
