"""What columns are called, by what they hold; names as ``shape.plain_name`` writes them, in their order."""

from __future__ import annotations

from rankfold.data.shapes.shape import Names

# English ones first: others may be translations beside them.
PROMPT_NAMES = (
    *("prompt", "question", "query", "problem", "input", "user", "human", "user_query", "user_input"),
    *("user_message", "user_prompt", "input_text", "ask"),
    *(
        "frage",
        "eingabe",
        "pregunta",
        "consulta",
        "entrada",
        "domanda",
        "pergunta",
        "vraag",
        "вопрос",
        "запрос",
    ),
    *(
        "问题",
        "問題",
        "提问",
        "提問",
        "输入",
        "輸入",
        "用户",
        "指令",
        "質問",
        "入力",
        "질문",
        "입력",
        "سؤال",
        "प्रश्न",
    ),
)
ANSWER_NAMES = (
    *("completion", "response", "answer", "output", "solution", "assistant", "reply"),
    *("model_response", "assistant_response", "bot", "target", "output_text", "target_text"),
    *("antwort", "ausgabe", "réponse", "reponse", "respuesta", "salida", "risposta", "resposta", "antwoord"),
    *(
        "ответ",
        "回答",
        "答案",
        "回复",
        "回覆",
        "输出",
        "輸出",
        "助手",
        "応答",
        "出力",
        "답변",
        "대답",
        "응답",
    ),
    *("جواب", "إجابة", "उत्तर"),
)
IMAGE_NAMES = ("image", "images", "image_path", "image_paths")
CONTEXT_NAMES = ("context", "passage", "paragraph")
BESIDE: Names = {
    "system": ("system", "system_prompt", "system_message"),
    "tools": ("tools", "functions"),
    "images": IMAGE_NAMES,
}
