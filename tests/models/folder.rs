//! Folders that were named as a model's and have something else in them.

use std::fs;

use warpo::models::Head;

use super::weights::Folder;

#[test]
fn what_a_folder_has_instead_of_a_model_is_said() {
    let whole = Folder::copy("instead", "llama_tied");
    let dir = &whole.dir;
    whole.write();
    fs::remove_file(dir.join("model.safetensors")).unwrap();
    fs::write(dir.join("pytorch_model.bin"), "").unwrap();
    let e = whole.refused(Head::Lm);
    assert!(
        e.starts_with("DIR: has no model.safetensors: it has its weights as pytorch_model.bin"),
        "{e}"
    );
    fs::remove_file(dir.join("config.json")).unwrap();
    assert!(whole.refused(Head::Lm).starts_with("DIR: has no config.json: it has its weights as"));
    fs::remove_file(dir.join("pytorch_model.bin")).unwrap();
    let e = whole.refused(Head::Lm);
    assert!(e.starts_with("cannot read DIR/config.json"), "nothing is known of it: {e}");
    for (file, text, says) in [
        ("b.gguf", "", "it has its weights as b.gguf (GGUF), wanted safetensors"),
        ("final/config.json", "{}", "it is the folder of a run: its model is DIR/final"),
    ] {
        let path = dir.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        let e = whole.refused(Head::Lm);
        assert!(e.starts_with("DIR: has no config.json: ") && e.contains(says), "{file}: {e}");
    }
    for (text, says) in [
        ("7", "DIR/adapter_config.json: wanted a JSON object, got 7"),
        ("{}", "DIR/adapter_config.json: `peft_type` = null is not supported"),
        (
            r#"{"peft_type": "LORA", "r": 2, "target_modules": ["x"]}"#,
            "DIR/adapter_config.json: `base_model_name_or_path` = null is not supported",
        ),
    ] {
        fs::write(dir.join("adapter_config.json"), text).unwrap();
        let e = whole.refused(Head::Lm);
        assert!(e.starts_with(says), "{e}");
    }
}
