//! Where Python shows through a chat template: its values, its `json.dumps`, its white space, its refusals.

use std::fmt::Write as _;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, UndefinedBehavior, Value};
use serde_json::Value as Json;

use super::scan::{ITERABLE, SLICE};
use super::since_epoch;

/// What a template said through `raise_exception`.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// An environment set up as `transformers` 5 sets up Jinja's sandbox.
pub(super) fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_formatter(print);
    environment.set_unknown_method_callback(method);
    environment.add_function("raise_exception", |message: &Value| -> Result<(), Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message.to_string())))
    });
    environment.add_filter(ITERABLE, iterable);
    environment.add_filter("tojson", to_json);
    environment.add_filter("trim", trim);
    environment.add_filter("items", items);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Map | ValueKind::Seq | ValueKind::Undefined)
    });
    Ok(environment)
}

/// JSON as Python's `json.loads` gives it to a template.
pub(super) fn value(json: Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(whole), ..) => Value::from(whole),
            (_, Some(whole), _) => Value::from(whole),
            (.., Some(float)) => Value::from(float),
            _ => Value::from(number.to_string()),
        },
        Json::String(text) => Value::from(text),
        Json::Array(items) => items.into_iter().map(value).collect(),
        Json::Object(map) => Value::from_pairs(map.into_iter().map(|(key, json)| (key, value(json)))),
    }
}

/// `strftime_now(format)`: the time, which is an argument of the rendering, in UTC.
pub(super) fn strftime_now(now: SystemTime) -> Value {
    Value::from_function(move |format: &str| -> Result<String, Error> {
        let refuse = || Error::new(ErrorKind::InvalidOperation, "strftime_now cannot write this format");
        let (seconds, nanos) = since_epoch(now);
        let now = chrono::DateTime::from_timestamp(seconds, nanos).ok_or_else(refuse)?;
        let mut text = String::new();
        // chrono reports a bad format while it writes
        write!(text, "{}", now.naive_utc().format(format)).map_err(|_| refuse())?;
        Ok(text)
    })
}

/// `{{ value }}`: floats the way Python writes them, all else as the engine does.
fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match as_float(value) {
        Some(float) => out.write_str(&float_text(float, "nan", "inf")).map_err(Error::from),
        None => minijinja::escape_formatter(out, state, value),
    }
}

fn as_float(value: &Value) -> Option<f64> {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    is_float.then(|| f64::try_from(value.clone()).ok())?
}

/// Python loops over no `None`; the engine would loop over it no times.
fn iterable(value: Value) -> Result<Value, Error> {
    if value.is_none() {
        return Err(Error::new(ErrorKind::InvalidOperation, "'NoneType' object is not iterable"));
    }
    Ok(value)
}

/// `|trim` takes any value as its text first.
fn trim(value: &Value, chars: Option<&str>) -> String {
    let text = value.to_string();
    match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)).to_owned(),
        None => strip(&text).to_owned(),
    }
}

/// `|items` of something undefined is empty.
fn items(value: &Value) -> Result<Value, Error> {
    if value.is_undefined() {
        return Ok(Value::from(Vec::<Value>::new()));
    }
    minijinja::filters::items(value)
}

/// `|length` of something undefined is 0.
fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() { Ok(0) } else { minijinja::filters::length(value) }
}

/// What Python's `str.isspace` calls white space: Unicode's, and the four separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// `str.strip()`
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `str.rstrip()`
pub(super) fn strip_end(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// `sequence[start:stop:step]` with a step, as Python slices text and lists.
fn slice(value: &Value, bounds: &[Value]) -> Result<Value, Error> {
    let bound = |index: usize| match bounds.get(index) {
        Some(bound) if !bound.is_none() => i64::try_from(bound.clone()).map(Some),
        _ => Ok(None),
    };
    let step = bound(2)?.unwrap_or(1);
    if step == 0 || !matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Iterable) {
        return Err(Error::new(ErrorKind::InvalidOperation, "this cannot be sliced so"));
    }
    let items: Vec<Value> = value.try_iter()?.collect();
    let length = i64::try_from(items.len()).unwrap_or(i64::MAX);
    // where a walk in this direction may begin and must end; -1 is before the first
    let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let clamp = |bound: i64| (if bound < 0 { bound.saturating_add(length) } else { bound }).clamp(low, high);
    let (first, last) = if step > 0 { (low, high) } else { (high, low) };
    let start = bound(0)?.map_or(first, clamp);
    let stop = bound(1)?.map_or(last, clamp);
    let inside = |at: &i64| if step > 0 { *at < stop } else { *at > stop };
    let walk = std::iter::successors(Some(start), |at| at.checked_add(step)).take_while(inside);
    let taken = walk.filter_map(|at| items.get(usize::try_from(at).ok()?).cloned());
    Ok(match value.kind() {
        ValueKind::String => Value::from(taken.map(|c| c.to_string()).collect::<String>()),
        _ => taken.collect(),
    })
}

/// Methods that the engine's own Python methods lack or see otherwise.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if name == SLICE {
        return slice(value, args);
    }
    if let Some(text) = value.as_str() {
        let first = args.first().and_then(Value::as_str);
        match (name, first, args.len()) {
            ("strip", None, 0) => return Ok(strip(text).into()),
            ("lstrip", None, 0) => return Ok(text.trim_start_matches(is_space).into()),
            ("rstrip", None, 0) => return Ok(strip_end(text).into()),
            ("removeprefix", Some(part), 1) => return Ok(text.strip_prefix(part).unwrap_or(text).into()),
            ("removesuffix", Some(part), 1) => return Ok(text.strip_suffix(part).unwrap_or(text).into()),
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// Values within values that are written before one gives up; a request's own JSON nests less.
const DEPTH_MAX: usize = 256;

/// `json.dumps` as `transformers` offers it: no escapes for HTML, none for what is not ASCII unless asked.
#[expect(clippy::needless_pass_by_value, reason = "the template engine hands keyword arguments over by value")]
fn to_json(value: &Value, ensure_ascii: Option<bool>, options: Kwargs) -> Result<String, Error> {
    let indent: Option<Value> = options.get("indent")?;
    let indent = match indent.filter(|value| !value.is_none()) {
        Some(value) => match (value.as_str(), value.as_usize()) {
            (Some(text), _) => Some(text.to_owned()),
            (None, Some(spaces)) if spaces <= DEPTH_MAX => Some(" ".repeat(spaces)),
            _ => return Err(Error::new(ErrorKind::InvalidOperation, "tojson cannot indent by this")),
        },
        None => None,
    };
    let separators: Option<Value> = options.get("separators")?;
    let (item, key) = match separators.filter(|value| !value.is_none()) {
        Some(pair) => (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string()),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let mut writer = JsonWriter {
        out: String::new(),
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.or(ensure_ascii).unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        item,
        key,
    };
    options.assert_all_used()?;
    writer.write(value, 0)?;
    Ok(writer.out)
}

struct JsonWriter {
    out: String,
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    /// Between items, and between a key and its value.
    item: String,
    key: String,
}

impl JsonWriter {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(Error::new(ErrorKind::InvalidOperation, "nested too deeply for JSON"));
        }
        match value.kind() {
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.collect::<Vec<_>>();
                self.container(['[', ']'], &items, depth, |writer, item| writer.write(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    entries.push((scalar(&key)?, value.get_item(&key)?));
                }
                if self.sort_keys {
                    entries.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.container(['{', '}'], &entries, depth, |writer, (key, value)| {
                    writer.string(key);
                    writer.out.push_str(&writer.key);
                    writer.write(value, depth + 1)
                })?;
            }
            _ => self.out.push_str(&scalar(value)?),
        }
        Ok(())
    }

    fn container<T>(
        &mut self,
        [open, close]: [char; 2],
        items: &[T],
        depth: usize,
        mut write: impl FnMut(&mut Self, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.out.push_str(&self.item);
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    /// A new line, where there is an indent.
    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\x08' => self.out.push_str("\\b"),
                '\x0c' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // writing to a string cannot fail
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// JSON of a value that holds no others; a key is the same in quotes, and a string stands for itself.
fn scalar(value: &Value) -> Result<String, Error> {
    Ok(match value.kind() {
        ValueKind::None => "null".to_owned(),
        ValueKind::Bool => value.is_true().to_string(),
        ValueKind::Number => match as_float(value) {
            Some(float) => float_text(float, "NaN", "Infinity"),
            None => value.to_string(),
        },
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        other => {
            let problem = format!("a value of type {other} is not JSON serializable");
            return Err(Error::new(ErrorKind::BadSerialization, problem));
        }
    })
}

/// `repr(float)`: the fewest digits that read back equal, with an exponent below 1e-4 and from 1e16 on.
fn float_text(float: f64, nan: &str, infinity: &str) -> String {
    if float.is_nan() {
        return nan.to_owned();
    }
    if float.is_infinite() {
        return if float > 0.0 { infinity.to_owned() } else { format!("-{infinity}") };
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
        _ => format!("{float:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str) -> Result<String, Error> {
        let json = serde_json::json!({
            "a": [1, 2.5, "é<&'\u{7f}\u{1}"], "b": {}, "items": [true, null], "d": [], "e": {"z": 1, "y": [2]}
        });
        let context = Value::from_pairs([("x", value(json)), ("nothing", Value::from(()))]);
        environment()?.render_str(template, context)
    }

    #[track_caller]
    fn check(template: &str, expect: &str) {
        assert_eq!(render(template).unwrap(), expect, "{template}");
    }

    // Expectations of this table are what Python 3.12 prints.
    #[test]
    fn json_is_pythons() {
        check("{{ x.a|tojson }}", "[1, 2.5, \"é<&'\u{7f}\\u0001\"]");
        check("{{ x.a|tojson(ensure_ascii=true) }}", "[1, 2.5, \"\\u00e9<&'\u{7f}\\u0001\"]");
        check("{{ '🙂'|tojson(ensure_ascii=true) }}", "\"\\ud83d\\ude42\"");
        check("{{ x.e|tojson }}", r#"{"z": 1, "y": [2]}"#);
        check("{{ x.e|tojson(sort_keys=true) }}", r#"{"y": [2], "z": 1}"#);
        check("{{ x.e|tojson(separators=(',', ':')) }}", r#"{"z":1,"y":[2]}"#);
        check("{{ x.e|tojson(indent=2) }}", "{\n  \"z\": 1,\n  \"y\": [\n    2\n  ]\n}");
        check("{{ [x.b, x.d]|tojson(indent=1) }}", "[\n {},\n []\n]");
        check(
            "{{ [nothing, true, -0.0, 1e16, 0.00001, 1e-4, 123456789012345.0]|tojson }}",
            "[null, true, -0.0, 1e+16, 1e-05, 0.0001, 123456789012345.0]",
        );
        check("{{ {1: 2, false: 3, none: 4, 1.5: 5}|tojson }}", r#"{"1": 2, "false": 3, "null": 4, "1.5": 5}"#);
    }

    #[test]
    fn what_python_cannot_write_as_json_is_refused() {
        for template in
            ["{{ missing|tojson }}", "{{ [missing]|tojson }}", "{{ range|tojson }}", "{{ 1|tojson(indent=x) }}"]
        {
            assert!(render(template).is_err(), "{template}");
        }
    }

    #[test]
    fn values_print_as_in_python() {
        check(
            "{{ x.items }} {{ x.e }} {{ 1e16 }} {{ 0.1 }} {{ true }} {{ nothing }}",
            "[True, None] {'z': 1, 'y': [2]} 1e+16 0.1 True None",
        );
        check("{{ x.items|string ~ nothing }}", "[True, None]None");
    }

    #[test]
    fn a_method_of_a_mapping_wins_over_its_key() {
        check("{% for k, v in x.e.items() %}{{ k }}{% endfor %}{{ x['items'][0] }}", "zyTrue");
        check("{% for k, v in x.items() %}{{ k }}{% endfor %}", "abitemsde");
        check("{{ x.get('missing') }} {{ x.get('missing', 3) }}", "None 3");
    }

    #[test]
    fn white_space_is_pythons() {
        check("{{ '\u{1c} \u{a0}a\u{200b} \n'.strip() }}", "a\u{200b}");
        check("{{ ' xax '|trim }}{{ 'xax'|trim('x') }}{{ 'xa'.strip('x') }}{{ [' a']|trim }}", "xaxaa[' a']");
        check("{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('c') }}{{ 'abc'.removeprefix('z') }}", "bcababc");
    }

    #[test]
    fn slices_with_a_step_are_pythons() {
        let sliced = |value: &str, bounds: &str| render(&format!("{{{{ {value}.__slice__({bounds}) }}}}"));
        for (bounds, expect) in [
            ("none, none, -1", "edcba"),
            ("none, none, 2", "ace"),
            ("1, none, 2", "bd"),
            ("-2, 0, -1", "dcb"),
            ("3, none, -2", "db"),
            ("9, 1, -1", "edc"),
            ("-9, 9, 3", "ad"),
            ("1, 4, -1", ""),
            ("-9, none, -1", ""),
            ("none, none, -9223372036854775807", "e"),
        ] {
            assert_eq!(sliced("'abcde'", bounds).unwrap(), expect, "{bounds}");
            let list: Vec<String> = expect.chars().map(|c| format!("'{c}'")).collect();
            assert_eq!(sliced("('abcde'|list)", bounds).unwrap(), format!("[{}]", list.join(", ")), "{bounds}");
        }
        assert_eq!(sliced("[]", "none, none, -1").unwrap(), "[]");
        for (value, bounds) in
            [("'a'", "0, 1, 0"), ("x", "none, none, -1"), ("nothing", "none, none, -1"), ("[]", "'a', 1, 1")]
        {
            assert!(sliced(value, bounds).is_err(), "{value} {bounds}");
        }
    }

    #[test]
    fn undefined_and_none_are_told_apart() {
        check("{{ missing|length }}{{ missing|items|list }}{{ missing is sequence }}", "0[]True");
        check(
            "{{ nothing is iterable }}{{ 'a' is iterable }}{{ x is sequence }}{{ 1 is sequence }}",
            "FalseTrueTrueFalse",
        );
        assert!(render("{% for a in nothing|__iterable__ %}{% endfor %}").is_err());
        check("{% for a in missing|__iterable__ %}{% endfor %}", "");
    }
}
