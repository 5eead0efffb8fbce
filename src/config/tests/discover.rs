//! `[[model.discover]]`.

use forebay_backends::discovery::{Behind, HAS_KUBERNETES, Port, Workload};

use super::*;

#[test]
fn lists_of_workers() {
    let model = |keys: &str| format!("[[model]]\nname = 'm'\n[[model.discover]]\n{keys}\n");
    let source =
        |keys: &str| reader([]).text("f.toml", &model(keys)).unwrap().models.remove(0).discover.remove(0).source;
    let url = |text| Url::parse(text).unwrap();
    assert_eq!(source("file = '/w.json'"), Source::File("/w.json".into()));
    assert_eq!(
        source("dns = 'http://w.svc:8000/x/'\nresolver = '127.0.0.1:8600'"),
        Source::Addresses { url: url("http://w.svc:8000/x"), resolver: Some("127.0.0.1:8600".parse().unwrap()) }
    );
    assert_eq!(
        source("srv = 'https://_http._tcp.w'"),
        Source::Services { url: url("https://_http._tcp.w"), resolver: None }
    );
    let form = "and a name that DNS knows, as in";
    let cases = [
        ("every_seconds = 5", "f.toml:3:1: model[0].discover[0] is no list: write what lists the workers: `file`, `dns`, `srv`, `kubernetes`".to_owned()),
        ("file = 'a'\nsrv = 'http://w'", "f.toml:5:7: model[0].discover[0].srv is beside another list: must stand alone: write one `[[model.discover]]` for each list".to_owned()),
        ("file = 'a'\nresolver = '127.0.0.1:1'", "f.toml:5:12: model[0].discover[0].resolver is \"127.0.0.1:1\": needs `dns` or `srv` beside it".to_owned()),
        ("dns = 'https://w'", format!("f.toml:4:7: model[0].discover[0].dns is \"https://w\": must begin with http:// {form} http://vllm.models.svc:8000")),
        ("dns = 'http://10.0.0.1'", format!("f.toml:4:7: model[0].discover[0].dns is \"http://10.0.0.1\": must begin with http:// {form} http://vllm.models.svc:8000")),
        ("srv = 'http://u:p@w'", format!("f.toml:4:7: model[0].discover[0].srv is (redacted): must begin with http:// or https:// {form} http://_http._tcp.vllm.models.svc")),
        ("srv = 'http://_http._tcp.w:8000'", "f.toml:4:7: model[0].discover[0].srv is \"http://_http._tcp.w:8000\": must be without a port: each SRV record names its own".to_owned()),
        ("dns = 'http://w:8000/x/v1/'", "f.toml:4:7: model[0].discover[0].dns is \"http://w:8000/x/v1/\": must not end in /v1: write the address in front of it".to_owned()),
        ("dns = 'http://w:0'", "f.toml:4:7: model[0].discover[0].dns is \"http://w:0\": must have a port that can be connected to".to_owned()),
        ("file = 'a'\nresolver = 'x'", "f.toml:5:12: model[0].discover[0].resolver is \"x\": must be the address and port of a DNS server, as in 127.0.0.1:8600".to_owned()),
        ("file = 'a'\nevery_seconds = 0", "f.toml:5:17: model[0].discover[0].every_seconds is 0: must be at least 1 (omit the key for the default 5)".to_owned()),
    ];
    for (keys, expect) in cases {
        check(&model(keys), &[&expect]);
    }
}

#[test]
fn what_kubernetes_runs() {
    let of = |keys: &str| format!("[[model]]\nname = 'm'\n[[model.discover]]\nkubernetes = {keys}\n");
    let built = "f.toml:4:14: model[0].discover[0].kubernetes is nothing that this program was built with: build it with \
                 `cargo build --release --features kubernetes`, or use `dns` with a headless service";
    let check = |keys: &str, expect: &[&str]| {
        let built = (!HAS_KUBERNETES).then_some(built);
        check(&of(keys), &built.iter().chain(expect).copied().collect::<Vec<_>>());
    };
    check("{ service = 'vllm' }", &[]);
    check("{ pods = 'app in (vllm, sglang),tier!=x', namespace = 'models', port = 'http' }", &[]);
    let prefix = "model[0].discover[0].kubernetes";
    let name = |most: u32| format!("must be 1 to {most} small letters, digits and hyphens, as Kubernetes names it");
    check(
        "{ service = 'a.b', port = 0 }",
        &[
            &format!("f.toml:4:26: {prefix}.service is \"a.b\": {}", name(63)),
            &format!("f.toml:4:40: {prefix}.port is 0: must be at least 1 (omit the key where the pods have but one)"),
        ],
    );
    check(
        "{ pods = ' ', namespace = 'A', port = 'of-too-many-letters' }",
        &[
            &format!("f.toml:4:23: {prefix}.pods is \" \": must be a label selector, as in \"app=vllm,model=llama\""),
            &format!("f.toml:4:40: {prefix}.namespace is \"A\": {}", name(63)),
            &format!("f.toml:4:52: {prefix}.port is \"of-too-many-letters\": {}", name(15)),
        ],
    );
    check(
        "{ service = 'a', pods = 'b=c' }",
        &[&format!(
            "f.toml:4:38: {prefix}.pods is beside a service: must stand alone: the service selects its pods itself"
        )],
    );
    check(
        "{ port = 1 }",
        &[&format!(
            "f.toml:4:14: {prefix} is without pods: write `service`, the name of a service, or `pods`, a label selector as in \"app=vllm\""
        )],
    );
    if HAS_KUBERNETES {
        let config = reader([]).text("f.toml", &of("{ pods = 'a=b', port = 8000 }")).unwrap();
        let workload =
            Workload { namespace: None, behind: Behind::Labels, selector: "a=b".to_owned(), port: Port::Number(8000) };
        assert_eq!(config.models[0].discover[0].source, Source::Kubernetes(workload));
    }
}
