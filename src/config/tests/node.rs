//! `[[node]]`, and workers that name GPUs of it.

use super::*;

#[test]
fn nodes_and_the_gpus_that_workers_name() {
    let url = "url = 'http://w:1'\n";
    check_worker(&format!("{url}gpus = ['local/0', 'local/MIG-1']"), &[]);
    check_worker(
        &format!("{url}gpus = ['0', 'gpu-a/0']"),
        &[
            "f.toml:5:9: model[0].worker[0].gpus[0] is \"0\": must be a node and a GPU's index or UUID there, as in \"gpu-a/0\"",
            "f.toml:5:14: model[0].worker[0].gpus[1] is \"gpu-a/0\": must begin with a `[[node]]`'s name; without one with \"local/\", this machine's",
        ],
    );
    let form = "must be http:// or https://, a host and its port, and nothing more, as in http://gpu-a:7072";
    check(
        &format!(
            "[[node]]\nname = 'a'\nagent = 'http://a:7072'\n[[node]]\nname = 'a'\nagent = 'http://u:p@b:7072'\n[[node]]\nagent = 'b:7072'\n{MODEL}gpus = ['local/0']\n"
        ),
        &[
            "f.toml:5:8: node[1].name is \"a\": must be unique among nodes: `node[0].name` (f.toml:2:8) has it already",
            &format!("f.toml:6:9: node[1].agent is (redacted): {form}"),
            "f.toml:7:1: node[2].name is missing: write the name by which workers' `gpus` call the machine",
            &format!("f.toml:8:9: node[2].agent is \"b:7072\": {form}"),
            "f.toml:13:9: model[0].worker[0].gpus[0] is \"local/0\": must begin with the name of a `[[node]]`: a",
        ],
    );
}
